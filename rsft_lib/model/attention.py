"""Causal attention within each sample of a pack, with or without context parallelism.

A context-parallel rank has consecutive tokens of a micro-batch. For attention, an all-to-all gives each rank all of the
tokens for a part of the heads (DeepSpeed-Ulysses, arXiv:2309.14509): every rank has the same work, whatever the lengths
of the samples, and the kernel sees whole samples, for which it is fastest.
"""

import inspect
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import all_to_all
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from rsft_lib.model.shapes import heads_of_rank

DENSE = 1024


class Samples(NamedTuple):
    """The samples of a micro-batch, one after the other."""

    ends: Tensor
    """int32 [samples + 1]: cumulative lengths, starting with 0 (`cu_seqlens`)."""
    longest: int
    """Maximum length."""

    @property
    def dense(self) -> bool:
        """Whether it is one sample, of one of the few lengths that whole packs have.

        cuDNN is 5 to 9 % faster without boundaries inside, but prepares itself for each length.
        """
        return len(self.ends) == 2 and self.longest % DENSE == 0


def samples_of(cu_seqlens: list[int], device: torch.device | str = "cpu") -> Samples:
    """The samples at `cu_seqlens`, which starts with 0."""
    ends = torch.tensor(cu_seqlens, dtype=torch.int32)
    return Samples(ends.to(device), int(ends.diff().max()))


class _PackedAttention(torch.nn.Module):
    """Causal self-attention that replaces megatron-core's `DotProductAttention`; subclasses implement `attend`.

    The samples of the micro-batch are passed as `attention_bias`. megatron-core sees a micro-batch as one long row. Its
    own packed format (`packed_seq_params`) would require padding for context parallelism, and splitting queries, keys
    and values before the rotary embedding is applied.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()
        self.parallel = config.context_parallel_size
        without_rope = config.no_rope_freq and config.no_rope_freq[layer_number - 1]
        self.scale = None if without_rope else config.softmax_scale  # None for 1 / sqrt(d)
        tensor_ranks = config.tensor_model_parallel_size
        self.heads, self.groups = heads_of_rank(
            config.num_attention_heads // tensor_ranks, max(1, config.num_query_groups // tensor_ranks), self.parallel
        )
        self.setup(config)

    def setup(self, config) -> None:
        pass

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_, attention_bias: Samples, **__) -> Tensor:
        """query [t, 1, heads, d], key and value [t, 1, groups, d] of this rank -> [t, 1, heads * d]."""
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.parallel == 1:
            return self.attend(query, key, value, attention_bias).flatten(1).unsqueeze(1)
        copies = (query.shape[1] if self.groups == self.heads else self.parallel * self.groups) // key.shape[1]
        if copies > 1:
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        sizes = ((query, self.heads), (key, self.groups), (value, self.groups))
        mixed = self.attend(*(self._all_tokens(x, size) for x, size in sizes), attention_bias)
        return self._all_heads(mixed)[:, : query.shape[1]].flatten(1).unsqueeze(1)

    def _all_tokens(self, x: Tensor, size: int) -> Tensor:
        """[t / CP, heads, d], padded with zeros to CP * size heads -> [t, size, d]."""
        if missing := self.parallel * size - x.shape[1]:
            x = pad(x, (0, 0, 0, missing))
        return self._exchange(_Transpose.apply(x.unflatten(1, (self.parallel, size)))).flatten(0, 1)

    def _all_heads(self, mixed: Tensor) -> Tensor:
        """[t, size, d] -> [t / CP, CP * size, d]."""
        return _Transpose.apply(self._exchange(mixed.unflatten(0, (self.parallel, -1)))).flatten(1, 2)

    def _exchange(self, by_rank: Tensor) -> Tensor:
        """Send `by_rank[n]` to rank n; returns what arrives, in the same shape."""
        return all_to_all(parallel_state.get_context_parallel_group(), by_rank)


class _Transpose(torch.autograd.Function):
    """x [a, b, ..., d] -> [b, a, ..., d], contiguous; so is its gradient.

    torch copies strided tensors element by element, which in bf16 reaches a third of an H200's bandwidth. So 16 bytes
    are one element where the memory layout permits; a copy keeps their bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ratio = torch.complex128.itemsize // x.itemsize
        multiples = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
        wide = x.stride(-1) == 1 and all(n % ratio == 0 for n in multiples)
        return (x.view(torch.complex128) if wide else x).transpose(0, 1).contiguous().view(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Transpose.apply(grad)


class TorchAttention(_PackedAttention):
    """Attention by torch: FlashAttention over all samples at once on a GPU, otherwise sample by sample."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, samples: Samples) -> Tensor:
        if query.is_cuda and query.dtype != torch.float32:  # FlashAttention has no float32
            return _flash(query, key, value, samples, self.scale)
        lengths = samples.ends.diff().tolist()
        each = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        attend = partial(scaled_dot_product_attention, is_causal=True, scale=self.scale, enable_gqa=True)
        return torch.cat([attend(*sample).transpose(0, 1) for sample in each])


class TEAttention(_PackedAttention):
    """Attention by Transformer Engine with cuDNN kernels: about 1.6 times as fast on Hopper GPUs."""

    def setup(self, config) -> None:
        from transformer_engine.pytorch import DotProductAttention

        kernel = partial(
            DotProductAttention, self.heads, config.kv_channels, num_gqa_groups=self.groups, attention_dropout=0.0,
            softmax_scale=self.scale,
        )  # fmt: skip
        self.packed = kernel(qkv_format="thd", attn_mask_type="padding_causal")
        self.dense = kernel(qkv_format="sbhd", attn_mask_type="causal")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, samples: Samples) -> Tensor:
        if samples.dense:
            return self.dense(query[:, None], key[:, None], value[:, None]).view_as(query)
        return self.packed(
            query, key, value, cu_seqlens_q=samples.ends, cu_seqlens_kv=samples.ends,
            max_seqlen_q=samples.longest, max_seqlen_kv=samples.longest,
        ).view_as(query)  # fmt: skip


def _flash(query: Tensor, key: Tensor, value: Tensor, samples: Samples, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts grouped-query attention without a flag, 2.13 requires it.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return varlen_attn(
        query, key, value, samples.ends, samples.ends, samples.longest, samples.longest,
        scale=scale, window_size=(-1, 0), **grouped,
    )  # fmt: skip
