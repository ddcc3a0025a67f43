"""Weight names of megatron-core and Hugging Face: one table per family, used in both directions.

`FAMILIES` has, left, the name in a megatron-core checkpoint (the same for the Transformer Engine and the local layer
spec, at every parallel size). Then the axis that tensor parallelism shards, None for a replicated weight. Right, the
Hugging Face tensors that it consists of:

    one     the same tensor
    two     gate and up projection, concatenated along the rows
    three   query, key and value, interleaved by query group: the group's queries, its key, its value

The layout of `linear_qkv` is that of megatron/core/transformer/attention.py,
`SelfAttention.get_query_key_value_tensors`. Layers are numbered from 0 in both; `{}` stands for the number.
"""

from typing import NamedTuple

from transformers import PretrainedConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# Families differ by whole entries only.
_ATTENTION, _MLP = "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
_HF, _HF_ATTENTION, _HF_MLP = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_COMMON = {
    EMBEDDING: (0, ["model.embed_tokens.weight"]),
    _ATTENTION + "linear_qkv.layer_norm_weight": (None, [_HF + "input_layernorm.weight"]),
    _ATTENTION + "linear_qkv.weight": (0, [_HF_ATTENTION + f"{x}_proj.weight" for x in "qkv"]),
    _ATTENTION + "linear_proj.weight": (1, [_HF_ATTENTION + "o_proj.weight"]),
    _MLP + "linear_fc1.layer_norm_weight": (None, [_HF + "post_attention_layernorm.weight"]),
    _MLP + "linear_fc1.weight": (0, [_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"]),
    _MLP + "linear_fc2.weight": (1, [_HF_MLP + "down_proj.weight"]),
    "decoder.final_layernorm.weight": (None, ["model.norm.weight"]),
    HEAD: (0, ["lm_head.weight"]),
}
_QKV_BIAS = {_ATTENTION + "linear_qkv.bias": (0, [_HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"])}
_QK_NORM = {_ATTENTION + f"{x}_layernorm.weight": (None, [_HF_ATTENTION + f"{x}_norm.weight"]) for x in "qk"}
FAMILIES = {
    "qwen2": _COMMON | _QKV_BIAS,
    "qwen3": _COMMON | _QK_NORM,
    "llama": _COMMON,
    "mistral": _COMMON,
}


def head_dim(config: PretrainedConfig) -> int:
    """Dimension of one attention head, which may differ from hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Rows(NamedTuple):
    """A range of rows of a Hugging Face tensor, and its first row in the megatron-core weight (`at`)."""

    name: str
    start: int
    height: int
    at: int


def weight_map(config: PretrainedConfig) -> dict[str, list[str]]:
    """megatron-core name -> Hugging Face names, for every weight of the model, layer by layer."""
    table = {ours: theirs for ours, (_, theirs) in FAMILIES[config.model_type].items()}
    layers = [ours for ours in table if "{}" in ours]
    names = [EMBEDDING]
    names += [ours.format(layer) for layer in range(config.num_hidden_layers) for ours in layers]
    names += ["decoder.final_layernorm.weight"] + [HEAD] * (not config.tie_word_embeddings)
    return {name: [theirs.format(_layer(name)) for theirs in table[_row(name)]] for name in names}


def split_axis(name: str, config: PretrainedConfig) -> int | None:
    """The axis of a megatron-core weight that tensor parallelism shards; None if it is replicated."""
    return FAMILIES[config.model_type][_row(name)][0]


def row_map(config: PretrainedConfig) -> dict[str, list[Rows]]:
    """megatron-core name -> the Hugging Face rows that it consists of, in order."""
    shapes, groups = hf_shapes(config), config.num_key_value_heads
    return {
        ours: _stacked(theirs, shapes, parts=groups if len(theirs) == 3 else 1)
        for ours, theirs in weight_map(config).items()
    }


def _stacked(names: list[str], shapes: dict[str, tuple[int, ...]], parts: int) -> list[Rows]:
    """Split each tensor into `parts` and interleave them: the first part of every tensor, the second, and so on."""
    stacked, at = [], 0
    for part in range(parts):
        for name in names:
            count = shapes[name][0] // parts
            stacked.append(Rows(name, part * count, count, at))
            at += count
    return stacked


def hf_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, for every weight of the model."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    heights = {
        "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden,
        "gate_proj": ffn, "up_proj": ffn, "down_proj": hidden,
        "embed_tokens": vocab, "lm_head": vocab,
    }  # fmt: skip
    widths = {"o_proj": queries, "down_proj": ffn}

    def shape(name: str) -> tuple[int, ...]:
        module, kind = name.split(".")[-2:]
        if module not in heights:  # a norm
            return (head_dim(config) if module in ("q_norm", "k_norm") else hidden,)
        return (heights[module],) if kind == "bias" else (heights[module], widths.get(module, hidden))

    return {name: shape(name) for names in weight_map(config).values() for name in names}


def megatron_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """megatron-core name -> shape, for every weight of the model, without vocabulary padding."""
    shapes = hf_shapes(config)
    return {
        ours: (sum(shapes[name][0] for name in theirs), *shapes[theirs[0]][1:])
        for ours, theirs in weight_map(config).items()
    }


def _layer(name: str) -> str:
    """The layer number in a weight's name; '' if the weight does not belong to a layer."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else ""


def _row(name: str) -> str:
    """The weight's key in the table."""
    return name.replace(f"layers.{_layer(name)}.", "layers.{}.", 1) if _layer(name) else name
