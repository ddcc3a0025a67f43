"""A Hugging Face `config.json` as a megatron-core TransformerConfig. Nothing else describes the model."""

import json
from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rsft_lib.common.paths import existing

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
ROPE_TYPES = ("default", "linear", "llama3")  # those that change frequencies only


def read_config(folder: str | Path) -> PretrainedConfig:
    """The `config.json` of a model or checkpoint folder. Code that the folder brings along is never run.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is damaged, or describes a model that this kit cannot train; the message names the setting.
    """
    path = existing(Path(folder) / "config.json", "model config")
    try:
        family = json.loads(path.read_text(encoding="utf-8"))["model_type"]
        # Of another family, transformers would ask whether to run the folder's code.
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False) if family in FAMILIES else None
    except Exception as error:  # transformers raises many kinds; each means that the file is no model's config
        raise ValueError(f"{path} cannot be read as a model's config: {error}") from error
    _refuse_unsupported({"model_type": (family, FAMILIES)} if config is None else _expected(config), path)
    return config


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head; not every model has hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """`vocab_size` rounded up, so that the rows of an embedding divide over tensor-parallel ranks.

    >>> padded_vocab_size(151_665, 128)
    151680
    """
    return -(-vocab_size // multiple) * multiple


def attention_window(config: PretrainedConfig) -> int | None:
    """Positions that one token attends to at most, or None: attention to more than these would be another model's."""
    return getattr(config, "sliding_window", None)


def check_layout(config: PretrainedConfig, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Check that the model divides over ranks; its vocabulary is padded and need not.

    Raises:
        ValueError: with every size that does not.
    """
    groups, problems = config.num_key_value_heads, []
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % tensor_parallel:
            problems.append(f"{name} {getattr(config, name)} does not divide by tensor_parallel {tensor_parallel}")
    if groups % tensor_parallel and tensor_parallel % groups:
        problems.append(f"num_key_value_heads {groups} is no multiple or divisor of tensor_parallel {tensor_parallel}")
    rows = (config.num_attention_heads + 2 * groups) * head_dim(config)  # megatron-core splits them evenly
    if rows % tensor_parallel:
        problems.append(f"the {rows} rows of the fused QKV weight are not divisible by {tensor_parallel=}")
    if config.num_hidden_layers % pipeline_parallel:
        problems.append(
            f"num_hidden_layers {config.num_hidden_layers} does not divide by pipeline_parallel {pipeline_parallel}"
        )
    if problems:
        raise ValueError("this model does not divide over the ranks: " + "; ".join(problems))


def inverse_frequencies(config: PretrainedConfig) -> Tensor | None:
    """Scaled rotary frequencies as transformers computes them, float32 [head_dim / 2]; None for unscaled ones.

    megatron-core 0.16.1 knows Llama 3's scaling too, but takes only its factor from outside.
    """
    kind = config.rope_parameters["rope_type"]
    return None if kind == "default" else ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]


def transformer_config(config: PretrainedConfig, **run_settings) -> TransformerConfig:
    """The architecture of `config` with the settings of a run (parallel sizes, dtypes, fusions)."""
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
        add_qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        use_cpu_initialization=not torch.cuda.is_available(),
        **run_settings,
    )


def _leave_empty(weight: torch.Tensor) -> None:
    """Weights always come from a checkpoint.

    `perform_initialization=False` would say the same, but then megatron-core does not mark weights as split
    over tensor-parallel ranks, and the gradient norm counts rank 0's part only.
    """


def _expected(config: PretrainedConfig) -> dict[str, tuple]:
    """Setting -> (what it is, what it may be); one that a family does not have counts as what is expected of it."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {
        "hidden_act": (getattr(config, "hidden_act", None), ("silu",)),
        "attention_dropout": (getattr(config, "attention_dropout", 0.0), (0.0, None)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),  # also biases the output projection
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
        "rope_type": (rope.get("rope_type", "default"), ROPE_TYPES),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "quantization_config": (getattr(config, "quantization_config", None), (None,)),
    }


def _refuse_unsupported(expected: dict[str, tuple], path: Path) -> None:
    for name, (found, allowed) in expected.items():
        if found not in allowed:
            one_of = " or ".join(repr(value) for value in allowed if value is not None)
            raise ValueError(f"{path}: {name} is {found!r}; this kit trains models with {one_of or 'none'} only")
