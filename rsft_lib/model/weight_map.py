"""Weight names of megatron-core and Hugging Face: one table per family, used in both directions.

`FAMILIES` has, left, the name in a megatron-core checkpoint (the same for the Transformer Engine and the local layer
spec, at every parallel size). Then the axis that tensor parallelism shards, None for a replicated weight. Right, the
Hugging Face tensors that it consists of:

    one     the same tensor
    two     gate and up projection, concatenated along the rows
    three   query, key and value, interleaved by query group: the group's queries, its key, its value

Experts are stacked in megatron-core, [experts, rows, columns], and separate tensors in Hugging Face's files, whose
number is `{expert}`.

The layout of `linear_qkv` is that of megatron/core/transformer/attention.py,
`SelfAttention.get_query_key_value_tensors`. Layers are numbered from 0 in both; `{}` stands for the number.
"""

from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"

# Families differ by whole entries only.
_ATTENTION, _MLP = "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
_EXPERTS = _MLP + "experts.experts."
_HF, _HF_ATTENTION, _HF_MLP = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."
_OUTER = {
    EMBEDDING: (0, ["model.embed_tokens.weight"]),
    _ATTENTION + "linear_qkv.layer_norm_weight": (None, [_HF + "input_layernorm.weight"]),
    _ATTENTION + "linear_qkv.weight": (0, [_HF_ATTENTION + f"{x}_proj.weight" for x in "qkv"]),
    _ATTENTION + "linear_proj.weight": (1, [_HF_ATTENTION + "o_proj.weight"]),
    "decoder.final_layernorm.weight": (None, ["model.norm.weight"]),
    HEAD: (0, ["lm_head.weight"]),
}
_DENSE = _OUTER | {
    _MLP + "linear_fc1.layer_norm_weight": (None, [_HF + "post_attention_layernorm.weight"]),
    _MLP + "linear_fc1.weight": (0, [_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"]),
    _MLP + "linear_fc2.weight": (1, [_HF_MLP + "down_proj.weight"]),
}
_QKV_BIAS = {_ATTENTION + "linear_qkv.bias": (0, [_HF_ATTENTION + f"{x}_proj.bias" for x in "qkv"])}
_QK_NORM = {_ATTENTION + f"{x}_layernorm.weight": (None, [_HF_ATTENTION + f"{x}_norm.weight"]) for x in "qk"}
_SHARED = _HF_MLP + "shared_expert."
_SHARED_EXPERT = {
    _MLP + "shared_experts.linear_fc1.weight": (0, [_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"]),
    _MLP + "shared_experts.linear_fc2.weight": (1, [_SHARED + "down_proj.weight"]),
    _MLP + "shared_experts.gate_weight": (None, [_HF_MLP + "shared_expert_gate.weight"]),
}


def _experts(place: str, gate: str, up: str, down: str) -> dict:
    """Router and experts, whose Hugging Face names start with `place`."""
    one = place + "experts.{expert}."
    return {
        "decoder.layers.{}.pre_mlp_layernorm.weight": (None, [_HF + "post_attention_layernorm.weight"]),
        _MLP + "router.weight": (None, [place + "gate.weight"]),
        _EXPERTS + "linear_fc1.weight": (1, [one + f"{gate}.weight", one + f"{up}.weight"]),
        _EXPERTS + "linear_fc2.weight": (2, [one + f"{down}.weight"]),
    }


_QWEN_MOE = _OUTER | _experts(_HF_MLP, "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "qwen2": _DENSE | _QKV_BIAS,
    "qwen3": _DENSE | _QK_NORM,
    "llama": _DENSE,
    "mistral": _DENSE,
    "smollm3": _DENSE,
    "qwen2_moe": _QWEN_MOE | _QKV_BIAS | _SHARED_EXPERT,
    "qwen3_moe": _QWEN_MOE | _QK_NORM,
    "mixtral": _OUTER | _experts(_HF + "block_sparse_moe.", "w1", "w3", "w2"),
}


def has(config: PretrainedConfig, ending: str) -> bool:
    """Whether the layers of the family have a megatron-core weight with this ending."""
    return any(name.endswith(ending) for name in FAMILIES[config.model_type])


def expert_count(config: PretrainedConfig) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    return config.num_experts if has(config, ".router.weight") else 0


def expert_size(config: PretrainedConfig) -> int:
    """Intermediate size of a routed expert."""
    return getattr(config, "moe_intermediate_size", None) or config.intermediate_size


def shared_expert_size(config: PretrainedConfig) -> int:
    """Intermediate size of the expert of every token; 0 if the family has none, whatever `config.json` has."""
    return config.shared_expert_intermediate_size if has(config, "shared_experts.gate_weight") else 0


def head_dim(config: PretrainedConfig) -> int:
    """Dimension of one attention head, which may differ from hidden_size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Rows(NamedTuple):
    """A range of rows of a Hugging Face tensor, and its first row in the megatron-core weight (`at`)."""

    name: str
    start: int
    height: int
    at: int
    expert: int | None = None
    """The expert in a megatron-core weight of stacked experts, [experts, rows, columns]."""

    def of(self, weight: Tensor) -> Tensor:
        """These rows of the megatron-core weight."""
        return (weight if self.expert is None else weight[self.expert])[self.at : self.at + self.height]


def weight_map(config: PretrainedConfig) -> dict[str, list[str]]:
    """megatron-core name -> Hugging Face names, for every weight of the model, layer by layer.

    `{expert}` stands for the expert's number.
    """
    table = {ours: theirs for ours, (_, theirs) in FAMILIES[config.model_type].items()}
    layers = [ours for ours in table if "{}" in ours]
    names = [EMBEDDING]
    names += [ours.replace("{}", str(layer)) for layer in range(config.num_hidden_layers) for ours in layers]
    names += ["decoder.final_layernorm.weight"] + [HEAD] * (not config.tie_word_embeddings)
    return {name: [theirs.replace("{}", _layer(name)) for theirs in table[_row(name)]] for name in names}


def split_axis(name: str, config: PretrainedConfig) -> int | None:
    """The axis of a megatron-core weight that tensor parallelism shards; None if it is replicated."""
    return FAMILIES[config.model_type][_row(name)][0]


def row_map(config: PretrainedConfig) -> dict[str, list[Rows]]:
    """megatron-core name -> the Hugging Face rows that it consists of, in order."""
    shapes, groups = hf_shapes(config), config.num_key_value_heads
    return {
        ours: [
            rows._replace(expert=expert)
            for expert, names in _by_expert(theirs, config)
            for rows in _stacked(names, shapes, parts=groups if len(names) == 3 else 1)
        ]
        for ours, theirs in weight_map(config).items()
    }


def _by_expert(names: list[str], config: PretrainedConfig) -> list[tuple[int | None, list[str]]]:
    """The names of every expert; without experts (None, the names themselves)."""
    if "{expert}" not in names[0]:
        return [(None, names)]
    return [(i, [name.replace("{expert}", str(i)) for name in names]) for i in range(expert_count(config))]


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
    hidden, vocab, experts = config.hidden_size, config.vocab_size, expert_count(config)
    queries, keys = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    heights = {
        "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden, "embed_tokens": vocab, "lm_head": vocab,
        "gate": experts, "shared_expert_gate": 1,
    }  # fmt: skip

    def shape(name: str) -> tuple[int, ...]:
        module, kind = name.split(".")[-2:]
        if module in ("gate_proj", "up_proj", "w1", "w3"):
            return (_intermediate(name, config), hidden)
        if module in ("down_proj", "w2"):
            return (hidden, _intermediate(name, config))
        if module not in heights:  # a norm
            return (head_dim(config) if module in ("q_norm", "k_norm") else hidden,)
        return (heights[module],) if kind == "bias" else (heights[module], queries if module == "o_proj" else hidden)

    return {
        name: shape(name)
        for theirs in weight_map(config).values()
        for _, names in _by_expert(theirs, config)
        for name in names
    }


def _intermediate(name: str, config: PretrainedConfig) -> int:
    """The intermediate size of the MLP that a Hugging Face tensor belongs to."""
    if ".shared_expert." in name:
        return config.shared_expert_intermediate_size
    return expert_size(config) if ".experts." in name else config.intermediate_size


def megatron_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """megatron-core name -> shape, for every weight of the model, without vocabulary padding."""
    shapes, found = hf_shapes(config), {}
    for ours, theirs in weight_map(config).items():
        (expert, names), *others = _by_expert(theirs, config)
        stacked = () if expert is None else (1 + len(others),)
        found[ours] = (*stacked, sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
    return found


def _layer(name: str) -> str:
    """The layer number in a weight's name; '' if the weight does not belong to a layer."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else ""


def _row(name: str) -> str:
    """The weight's key in the table."""
    return name.replace(f"layers.{_layer(name)}.", "layers.{}.", 1) if _layer(name) else name
