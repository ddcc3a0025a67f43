"""A tiny random model of every family with its particular settings, and noise on every weight."""

from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SHAPE = {
    "vocab_size": 251,  # prime
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_ROPE = {  # of Llama 3.2, with a short context so that scaling affects short texts
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {  # the long form of Qwen2.5, with a short context
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
SMOL = {"pad_token_id": None, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama2": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 512}),
    "llama-linear": (
        LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "qwen2-yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN, "max_position_embeddings": 512}),
    "smollm3": (
        SmolLM3Config, SmolLM3ForCausalLM, {**SMOL, "tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "smollm3-yarn": (
        SmolLM3Config, SmolLM3ForCausalLM, {**SMOL, "rope_parameters": YARN, "no_rope_layers": [1, 1, 0, 1]},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": 64}),
    "qwen3_moe": (  # 4 experts per token: two ranks gather the tokens, four exchange them
        Qwen3MoeConfig, Qwen3MoeForCausalLM,
        {**EXPERTS, "num_experts_per_tok": 4, "head_dim": 32, "norm_topk_prob": True},
    ),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM, {**EXPERTS, "shared_expert_intermediate_size": 80}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def tiny_family(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A model of a family, saved in `folder`."""
    config, model, particular = FAMILIES[family]
    torch.manual_seed(0)
    made = model(config(**{**SHAPE, **particular, **changes}))
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    made = made.to(dtype)
    made.save_pretrained(folder)
    return made.eval()
