"""The Hugging Face `config.json` of a model: whether this kit can train it, and how it can be partitioned."""

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from rsft_lib.common.paths import require_path
from rsft_lib.model.weight_map import FAMILIES, expert_count, expert_size, head_dim, shared_expert_size

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those that depend on neither the sequence nor the layer
UNSUPPORTED = {  # families that are asked for -> what they need
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        "megatron-core computes its Gated DeltaNet layers over packed samples with CUDA kernels only "
        "(flash-linear-attention), so that nothing could be compared with transformers on a CPU",
    ),
    **dict.fromkeys(("olmo2", "olmo3"), "it normalizes the outputs of attention and MLP instead of their inputs"),
    "granite": "it multiplies embeddings, residuals and logits by constants",
    "gpt_oss": "its experts have biases, and its attention has sinks",
    "deepseek_v3": "its attention is multi-head latent attention",
}


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read the `config.json` of a model or checkpoint folder. Code in the folder is never run.

    Raises:
        FileNotFoundError: the folder has no config.
        ValueError: it is damaged, or describes a model that this kit cannot train; the message names the setting.
    """
    path = require_path(Path(folder) / "config.json", "model config")
    try:
        family = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        # For other families, transformers would ask whether to run the folder's code.
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False) if family in FAMILIES else None
    except Exception as error:  # transformers raises many types; all mean that the file is not a model config
        raise ValueError(f"{path} cannot be read as a model config: {error}") from error
    _refuse_unsupported({"model_type": (family, tuple(FAMILIES))} if config is None else _accepted(config), path)
    return config


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up to a multiple, so that embedding rows are divisible by the tensor-parallel size.

    >>> padded_vocab_size(151_665, 128)
    151680
    """
    return -(-vocab_size // multiple) * multiple


def attention_window(config: PretrainedConfig) -> int | None:
    """The sliding window: the maximum number of positions that a token attends to; None if unlimited."""
    used = getattr(config, "use_sliding_window", True)
    return (getattr(config, "sliding_window", None) or None) if used else None


def check_layout(
    config: PretrainedConfig,
    tensor_parallel: int,
    pipeline_parallel: int,
    virtual_pipeline: int = 1,
    expert_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    sequence_parallel: bool = True,
) -> None:
    """Check that the model can be partitioned across ranks; the vocabulary is padded and always can.

    Raises:
        ValueError: lists every size that is not divisible.
    """
    heads, groups, problems = config.num_attention_heads, config.num_key_value_heads, []
    experts = expert_count(config)
    if not experts and expert_parallel * expert_tensor_parallel > 1:
        problems.append(f"{expert_parallel=} and {expert_tensor_parallel=}, but {config.model_type} has no experts")
    for name, value, by, size in _divided(config, tensor_parallel, expert_parallel, expert_tensor_parallel):
        if value % size:
            problems.append(f"{name}={value} is not divisible by {by}={size}")
    if groups % tensor_parallel and tensor_parallel % groups:
        problems.append(f"num_key_value_heads={groups} is neither a multiple nor a divisor of {tensor_parallel=}")
    if experts and tensor_parallel > 1 and not sequence_parallel:
        problems.append(f"a model with experts needs sequence_parallel if {tensor_parallel=}")
    rows = (heads + 2 * groups) * head_dim(config)  # megatron-core splits them evenly
    if rows % tensor_parallel:
        problems.append(f"the {rows} rows of the fused QKV weight are not divisible by {tensor_parallel=}")
    if config.num_hidden_layers % (pipeline_parallel * virtual_pipeline):
        by_virtual = f" x {virtual_pipeline=}" if virtual_pipeline > 1 else ""
        problems.append(
            f"num_hidden_layers={config.num_hidden_layers} is not divisible by {pipeline_parallel=}{by_virtual}"
        )
    if problems:
        raise ValueError("this model cannot be partitioned across the ranks: " + "; ".join(problems))


def _divided(config: PretrainedConfig, tensor: int, expert: int, expert_tensor: int) -> list[tuple[str, int, str, int]]:
    """(setting of the model, its value, parallel size that must divide it, its value)"""
    heads = ("num_attention_heads", config.num_attention_heads, "tensor_parallel", tensor)
    if not expert_count(config):
        return [heads, ("intermediate_size", config.intermediate_size, "tensor_parallel", tensor)]
    return [
        heads,
        ("number of experts", expert_count(config), "expert_parallel", expert),
        ("intermediate size of an expert", expert_size(config), "expert_tensor_parallel", expert_tensor),
        ("shared_expert_intermediate_size", shared_expert_size(config), "tensor_parallel", tensor),
    ]


def normalizes_experts(config: PretrainedConfig) -> bool:
    """Whether the probabilities of a token's experts are normalized to the sum 1; those of Mixtral always are."""
    return bool(expert_count(config)) and (config.model_type == "mixtral" or config.norm_topk_prob)


def _accepted(config: PretrainedConfig) -> dict[str, tuple]:
    """Setting -> (value, allowed values); a setting that the family lacks has an allowed value."""
    rope = getattr(config, "rope_parameters", None) or {}
    alone = normalizes_experts(config) and config.num_experts_per_tok == 1  # its probability would always be 1
    return {
        "hidden_act": (getattr(config, "hidden_act", None), ("silu",)),
        "attention_dropout": (getattr(config, "attention_dropout", 0.0), (0.0, None)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),  # also biases the output projection
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "rope_type": (rope.get("rope_type", "default"), ROPE_TYPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "decoder_sparse_step": (getattr(config, "decoder_sparse_step", 1), (1,)),  # every layer has experts
        "mlp_only_layers": (getattr(config, "mlp_only_layers", []), ([],)),
        "norm_topk_prob with num_experts_per_tok=1": (alone, (False,)),
        "qkv_bias": (getattr(config, "qkv_bias", True), (True,)),
        "router_jitter_noise": (getattr(config, "router_jitter_noise", 0.0), (0.0,)),
        "quantization_config": (getattr(config, "quantization_config", None), (None,)),
    }


def _refuse_unsupported(expected: dict[str, tuple], path: Path) -> None:
    for name, (value, allowed) in expected.items():
        if name == "model_type" and value in UNSUPPORTED:
            raise ValueError(f"{path}: model_type is {value!r}, which is not supported: {UNSUPPORTED[value]}")
        if value not in allowed:
            one_of = " or ".join(repr(choice) for choice in allowed if choice is not None)
            raise ValueError(f"{path}: {name} is {value!r}; this kit only trains models with {one_of or 'none'}")
