"""A Hugging Face `config.json` as a megatron-core TransformerConfig; nothing else describes the model."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rsft_lib.model.config import normalizes_experts
from rsft_lib.model.weight_map import expert_count, expert_size, has, head_dim, shared_expert_size


def transformer_config(config: PretrainedConfig, backend: str = "torch", **run_settings) -> TransformerConfig:
    """The architecture of `config` with the settings of a run (parallel sizes, dtypes, fusions, ...).

    Args:
        backend: of the layers, 'te' (Transformer Engine) or 'torch'.
    """
    ranks = run_settings.get("expert_model_parallel_size", 1)
    return TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=head_dim(config),
        layernorm_epsilon=config.rms_norm_eps,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=has(config, "linear_qkv.bias"),
        qk_layernorm=has(config, "q_layernorm.weight"),
        softmax_scale=attention_scale(config),
        no_rope_freq=_layers_without_rope(config),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        use_cpu_initialization=not torch.cuda.is_available(),
        **({"expert_tensor_parallel_size": 1} | _experts(config, backend == "te", ranks) | run_settings),
    )


def _layers_without_rope(config: PretrainedConfig) -> list[int] | None:
    """For each layer, 1 if it has no rotary embedding (SmolLM3); None if all have.

    `no_rope_layers` of `config.json` has, despite its name, a 1 for each layer with one.
    """
    with_rope = (getattr(config, "no_rope_layers", None) or [])[: config.num_hidden_layers]
    return None if all(with_rope) else [int(not rope) for rope in with_rope]


def _experts(config: PretrainedConfig, te: bool, ranks: int) -> dict:
    """Settings of the router and the experts; none for a dense model.

    The router is computed in float32, as in transformers. Every token reaches all of its experts (no capacity). The
    auxiliary loss of `config.json` is that of pretraining and not used: see `preflight`.

    Args:
        ranks: over which the experts are distributed. A token is sent once to each of the others or once per expert,
            whichever is less: see `benchmarks/moe_gpu.py`.
    """
    if not expert_count(config):
        return {}
    shared = shared_expert_size(config)
    return {
        "num_moe_experts": expert_count(config),
        "moe_ffn_hidden_size": expert_size(config),
        "moe_router_topk": config.num_experts_per_tok,
        # The softmax over the chosen experts alone has the ratios of the one over all, normalized.
        "moe_router_pre_softmax": not normalizes_experts(config),
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather" if 1 < ranks < config.num_experts_per_tok else "alltoall",
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": shared > 0,
        "moe_grouped_gemm": te,
        "moe_permute_fusion": te,
        "bias_activation_fusion": te,  # SwiGLU and the multiplication with the router's probability in one kernel
    }


def _leave_empty(weight: torch.Tensor) -> None:
    """Skip initialization: weights always come from a checkpoint.

    With `perform_initialization=False` megatron-core would not mark weights as tensor-parallel, and the gradient norm
    would only include rank 0's shard.
    """


def attention_scale(config: PretrainedConfig) -> float | None:
    """The factor of the products of queries and keys in layers with rotary embeddings; None for 1 / sqrt(head_dim).

    YaRN (https://arxiv.org/abs/2309.00071) multiplies queries and keys, and so their product by the square.
    """
    if config.rope_parameters["rope_type"] != "yarn":
        return None
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1] ** 2 / head_dim(config) ** 0.5


def inverse_frequencies(config: PretrainedConfig) -> Tensor | None:
    """Scaled rotary frequencies as transformers computes them, float32 [head_dim / 2]; None if unscaled.

    megatron-core 0.16.1 implements Llama 3's scaling, but only its factor can be set.
    """
    kind = config.rope_parameters["rope_type"]
    return None if kind == "default" else ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
