"""The names of a model's weights in both worlds: a table for each family, read in both directions.

Left, the name in a megatron-core checkpoint (the same for the Transformer Engine layer spec and the local one, at
every tensor and pipeline size). Then the axis over which tensor-parallel ranks share the weight, None for one that
each of them has whole. Right, the Hugging Face tensors it is made of:

    one     the same tensor
    two     gate and up projection, one below the other
    three   query, key and value, interleaved by query group: the group's queries, its key, its value

The layout of `linear_qkv` is that of megatron/core/transformer/attention.py,
`SelfAttention.get_query_key_value_tensors`. Layers count from 0 in both worlds; `{}` stands for their number.
"""

from typing import NamedTuple

from transformers import PretrainedConfig

from rsft_lib.model.config import head_dim

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# The rows of one family differ from those of another by whole lines only.
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


class Rows(NamedTuple):
    """Rows of a Hugging Face tensor, and the row of the megatron-core weight at which they stand."""

    name: str
    start: int
    count: int
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
    """The axis of a megatron-core weight over which tensor-parallel ranks share it, None if each has it whole."""
    return FAMILIES[config.model_type][_row(name)][0]


def row_map(config: PretrainedConfig) -> dict[str, list[Rows]]:
    """megatron-core name -> where its rows come from, or go to, from the first row to the last."""
    shapes, groups = hf_shapes(config), config.num_key_value_heads
    return {
        ours: _stacked(theirs, shapes, parts=groups if len(theirs) == 3 else 1)
        for ours, theirs in weight_map(config).items()
    }


def _stacked(names: list[str], shapes: dict[str, tuple[int, ...]], parts: int) -> list[Rows]:
    """The tensors cut into `parts` each: first part of every tensor, second part of every tensor, and so on."""
    found, at = [], 0
    for part in range(parts):
        for name in names:
            count = shapes[name][0] // parts
            found.append(Rows(name, part * count, count, at))
            at += count
    return found


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
    """megatron-core name -> shape, for every weight of the model, its vocabulary not padded."""
    shapes = hf_shapes(config)
    return {
        ours: (sum(shapes[name][0] for name in theirs), *shapes[theirs[0]][1:])
        for ours, theirs in weight_map(config).items()
    }


def _layer(name: str) -> str:
    """The number in the name of a layer's weight, '' for others."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else ""


def _row(name: str) -> str:
    """The name as the table has it."""
    return name.replace(f"layers.{_layer(name)}.", "layers.{}.", 1) if _layer(name) else name
