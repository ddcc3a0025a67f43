"""A Hugging Face `config.json` as a megatron-core TransformerConfig. Nothing else describes the model."""

from pathlib import Path

import torch
from megatron.core.transformer import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from rsft_lib.paths import existing


def read_config(folder: str | Path) -> PretrainedConfig:
    """The `config.json` of a model or checkpoint folder.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it describes a model that this kit cannot train; the message names the setting.
    """
    path = existing(Path(folder) / "config.json", "model config")
    config = AutoConfig.from_pretrained(path.parent)
    _refuse_unsupported(config, path)
    return config


def head_dim(config: PretrainedConfig) -> int:
    """Width of one attention head; not every model has hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


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
        add_qkv_bias=True,
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


def _refuse_unsupported(config: PretrainedConfig, path: Path) -> None:
    expected = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0}
    found = {name: getattr(config, name, None) for name in expected}
    expected["rope_type"], found["rope_type"] = "default", config.rope_parameters["rope_type"]
    for name, value in expected.items():
        if found[name] != value:
            raise ValueError(f"{path}: {name} is {found[name]!r}; this kit trains models with {value!r} only")
