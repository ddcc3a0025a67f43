"""The names of one model's weights in both worlds: a table, read left to right on import and back on export.

Left, the name in a megatron-core `torch_dist` checkpoint (the same for the Transformer Engine layer spec and
the local one, at every tensor and pipeline size). Right, the Hugging Face tensors it is made of:

    one     the same tensor
    two     gate and up projection, one below the other
    three   query, key and value, interleaved by query group: the group's queries, its key, its value

Megatron-LM's layout of `linear_qkv` is that of megatron/core/transformer/attention.py,
`SelfAttention.get_query_key_value_tensors`.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rsft_lib.model.config import head_dim

LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"],
    "self_attention.linear_qkv.weight": [f"self_attn.{x}_proj.weight" for x in "qkv"],
    "self_attention.linear_qkv.bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
ENDS = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
    "output_layer.weight": ["lm_head.weight"],
}


def weight_map(config: PretrainedConfig) -> dict[str, list[str]]:
    """megatron-core name -> Hugging Face names, for every weight of the model."""
    table = {
        f"decoder.layers.{layer}.{ours}": [f"model.layers.{layer}.{name}" for name in theirs]
        for layer in range(config.num_hidden_layers)
        for ours, theirs in LAYER.items()
    }
    table |= ENDS
    if config.tie_word_embeddings:
        del table["output_layer.weight"]
    return table


def hf_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape, for every weight of the model."""
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    queries, keys = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    rows = {
        "q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": hidden,
        "gate_proj": ffn, "up_proj": ffn, "down_proj": hidden,
        "embed_tokens": vocab, "lm_head": vocab,
    }  # fmt: skip
    columns = {"o_proj": queries, "down_proj": ffn}

    def shape(name: str) -> tuple[int, ...]:
        module, kind = name.split(".")[-2:]
        if module not in rows:  # a norm
            return (hidden,)
        return (rows[module],) if kind == "bias" else (rows[module], columns.get(module, hidden))

    return {name: shape(name) for names in weight_map(config).values() for name in names}


def to_megatron(read: Callable[[str], Tensor], config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (megatron-core name, tensor), one weight at a time; `read` gives a Hugging Face tensor by name."""
    for ours, theirs in weight_map(config).items():
        yield ours, join([read(name) for name in theirs], config)


def to_hf(read: Callable[[str], Tensor], config: PretrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, tensor), one weight at a time; `read` gives a megatron-core tensor by name."""
    for ours, theirs in weight_map(config).items():
        yield from zip(theirs, split(read(ours), len(theirs), config), strict=True)


def join(tensors: list[Tensor], config: PretrainedConfig) -> Tensor:
    """The Hugging Face tensors of one weight as megatron-core's one."""
    if len(tensors) == 3:
        groups = config.num_key_value_heads
        tensors = [t.reshape(groups, -1, *t.shape[1:]) for t in tensors]  # [groups, rows of one group, ...]
        return torch.cat(tensors, dim=1).flatten(0, 1)
    return torch.cat(tensors) if len(tensors) == 2 else tensors[0]


def split(tensor: Tensor, parts: int, config: PretrainedConfig) -> list[Tensor]:
    """The inverse of `join`."""
    if parts == 3:
        groups, width = config.num_key_value_heads, head_dim(config)
        grouped = tensor.reshape(groups, -1, *tensor.shape[1:])
        rows = [config.num_attention_heads // groups * width, width, width]
        return [t.flatten(0, 1) for t in grouped.split(rows, dim=1)]
    return list(tensor.chunk(parts))
