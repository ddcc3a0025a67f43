"""Causal attention within each sample of a pack, with or without context parallelism.

Context parallelism splits a micro-batch into 2 * size equal chunks. Each rank holds one chunk from the front and its
mirror from the back, which balances the work. Keys and values are small (grouped-query attention), so every rank
all-gathers them and attends with its own queries; samples need no padding.
"""

import inspect
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DENSE = 1024


class Chunk(NamedTuple):
    """Consecutive queries of a rank and the keys they attend to; in each sample the last query sees the last key."""

    queries: slice
    """Rows of this rank."""
    keys: slice
    """Rows of the whole micro-batch."""
    query_ends: Tensor
    """int32 [pieces of samples + 1]: cumulative lengths of the pieces in `queries`, starting with 0."""
    key_ends: Tensor
    """The same for `keys`."""
    longest: tuple[int, int]
    """Maximum number of queries and of keys in one piece."""

    @property
    def dense(self) -> bool:
        """Whether all of it is the start of one sample, at one of the few lengths that whole packs have.

        cuDNN is 5 to 9 % faster without boundaries inside, and more with few keys, but prepares itself for each length.
        """
        return len(self.query_ends) == 2 and self.keys.start == 0 and all(n % DENSE == 0 for n in self.longest)


def packed(cu_seqlens: list[int], device: torch.device) -> tuple[Chunk]:
    """The one chunk of a micro-batch without context parallelism; `cu_seqlens` starts with 0."""
    (chunk,) = chunks_of(cu_seqlens)
    ends = chunk.query_ends.to(device)
    return (chunk._replace(query_ends=ends, key_ends=ends),)


def chunks_of(cu_seqlens: list[int], rank: int = 0, size: int = 1) -> tuple[Chunk, ...]:
    """The chunks of one context-parallel rank of a micro-batch with samples at `cu_seqlens`; tensors on the CPU."""
    chunks, first = [], 0
    for low, high in _bounds(cu_seqlens[-1], rank, size):
        chunks.append(_chunk(cu_seqlens, low, high, first))
        first += high - low
    return tuple(chunks)


def share(rows: Tensor, rank: int, size: int) -> Tensor:
    """The shard of rows [1, t] on a context-parallel rank, [1, t / size]."""
    return torch.cat([rows[:, low:high] for low, high in _bounds(rows.shape[1], rank, size)], dim=1)


def _bounds(total: int, rank: int, size: int) -> list[tuple[int, int]]:
    if size == 1:
        return [(0, total)]
    width = total // (2 * size)
    return [(index * width, (index + 1) * width) for index in (rank, 2 * size - 1 - rank)]


def _chunk(cu_seqlens: list[int], low: int, high: int, first: int) -> Chunk:
    queries, keys, start = [0], [0], None
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        if end <= low or begin >= high:
            continue
        start = begin if start is None else start
        queries.append(min(end, high) - low)
        keys.append(min(end, high) - start)
    longest_queries, longest_keys = (max(b - a for a, b in pairwise(ends)) for ends in (queries, keys))
    query_ends, key_ends = (torch.tensor(ends, dtype=torch.int32) for ends in (queries, keys))
    longest = (longest_queries, longest_keys)
    return Chunk(slice(first, first + high - low), slice(start, high), query_ends, key_ends, longest)


class _PackedAttention(torch.nn.Module):
    """Causal self-attention that replaces megatron-core's `DotProductAttention`; subclasses implement `attend`.

    This rank's chunks are passed as `attention_bias`. megatron-core sees a micro-batch as one long row. Its own packed
    format (`packed_seq_params`) would require padding for context parallelism, and splitting queries, keys and values
    before the rotary embedding is applied.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()
        self.parallel = config.context_parallel_size
        without_rope = config.no_rope_freq and config.no_rope_freq[layer_number - 1]
        self.scale = None if without_rope else config.softmax_scale  # None for 1 / sqrt(d)
        self.setup(config)

    def setup(self, config) -> None:
        pass

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_, attention_bias: tuple[Chunk, ...], **__) -> Tensor:
        """query [t, 1, heads, d], key and value [t, 1, groups, d] of this rank -> [t, 1, heads * d]."""
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.parallel == 1:
            return self.attend(query, key, value, attention_bias[0]).flatten(1).unsqueeze(1)
        key, value = self._gather(key, value)
        mixed = [self.attend(query[c.queries], key[c.keys], value[c.keys], c) for c in attention_bias]
        return torch.cat(mixed).flatten(1).unsqueeze(1)

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks in the order of the micro-batch; backward returns gradients to their ranks."""
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), group=parallel_state.get_context_parallel_group()
        )
        by_rank = both.chunk(2 * self.parallel)  # front and back chunk of rank 0, of rank 1, ...
        in_order = torch.cat([*by_rank[0::2], *by_rank[1::2][::-1]])
        key, value = in_order.chunk(2, dim=-1)
        return key.contiguous(), value.contiguous()


class TorchAttention(_PackedAttention):
    """Attention by torch: FlashAttention over all samples at once on a GPU, otherwise sample by sample."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        if query.is_cuda and query.dtype != torch.float32:  # FlashAttention has no float32
            return _flash(query, key, value, chunk, self.scale)
        lengths = [ends.diff().tolist() for ends in (chunk.query_ends, chunk.key_ends)]
        pieces = (
            x.transpose(0, 1).split(n, dim=1) for x, n in zip((query, key, value), lengths + lengths[1:], strict=True)
        )
        return torch.cat([_causal(*piece, scale=self.scale).transpose(0, 1) for piece in zip(*pieces, strict=True)])


class TEAttention(_PackedAttention):
    """Attention by Transformer Engine with cuDNN kernels: about 1.6 times as fast on Hopper GPUs."""

    def setup(self, config) -> None:
        from transformer_engine.pytorch import DotProductAttention

        ranks, mask = config.tensor_model_parallel_size, "causal" if self.parallel == 1 else "causal_bottom_right"
        kernel = partial(
            DotProductAttention,
            config.num_attention_heads // ranks,
            config.kv_channels,
            num_gqa_groups=max(1, config.num_query_groups // ranks),
            attention_dropout=0.0,
            softmax_scale=self.scale,
        )
        self.packed = kernel(qkv_format="thd", attn_mask_type=f"padding_{mask}")
        self.dense = kernel(qkv_format="sbhd", attn_mask_type=mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> Tensor:
        # It rejects tensors with a storage offset, which later chunks have.
        query, key, value = (x.clone() if x.storage_offset() else x for x in (query, key, value))
        if chunk.dense:
            return self.dense(query[:, None], key[:, None], value[:, None]).view_as(query)
        return self.packed(
            query, key, value,
            cu_seqlens_q=chunk.query_ends, cu_seqlens_kv=chunk.key_ends,
            max_seqlen_q=chunk.longest[0], max_seqlen_kv=chunk.longest[1],
        ).view_as(query)  # fmt: skip


def _causal(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None) -> Tensor:
    """[heads, q, d], [groups, k, d] twice -> [heads, q, d]; the queries are the last q of the k positions."""
    if query.shape[1] == key.shape[1]:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
    mask = mask.tril(key.shape[1] - query.shape[1])
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def _flash(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts grouped-query attention without a flag, 2.13 requires it.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query, key, value, chunk.query_ends, chunk.key_ends, *chunk.longest,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
