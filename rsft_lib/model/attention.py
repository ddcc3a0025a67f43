"""Causal attention within each sample of a pack, with or without context parallelism.

A context-parallel rank has consecutive tokens of a micro-batch. For attention, an all-to-all gives each rank all of the
tokens for a part of the heads (DeepSpeed-Ulysses, arXiv:2309.14509): every rank has the same work, whatever the lengths
of the samples, and the kernel sees whole samples, for which it is fastest. Where attention takes long enough, the heads
are exchanged in two parts: the second arrives, and the first returns, while the other one is computed.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

DENSE = 1024
LONG = 2**17  # heads on a rank times tokens of a micro-batch, from which it pays to exchange in two parts


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
        self.halves = halves_of(self.heads, self.groups)
        self.setup(config)

    def setup(self, config) -> None:
        pass

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_, attention_bias: Samples, **__) -> Tensor:
        """query [t, 1, heads, d], key and value [t, 1, groups, d] of this rank -> [t, 1, heads * d]."""
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.parallel == 1:
            return self.attend(query, key, value, attention_bias).flatten(1).unsqueeze(1)
        long = self.heads * len(query) * self.parallel >= LONG
        parts = self.halves if long else [(self.heads, self.groups)]
        arriving = [self._start(by_rank) for by_rank in self._by_rank(query, key, value, parts)]
        returning = []
        for (heads, groups), finish in zip(parts, arriving, strict=True):
            sizes = [heads, groups, groups] if groups else [heads]
            own, *others = (x.contiguous() for x in finish().flatten(0, 1).split(sizes, dim=1))
            key, value = others or (key, value)
            mixed = self.attend(own, key, value, attention_bias)
            returning.append(self._start(mixed.unflatten(0, (self.parallel, -1))))
        every = torch.cat([finish().transpose(0, 1) for finish in returning], dim=2)  # [t / CP, CP, self.heads, d]
        return every.flatten(1, 2)[:, : query.shape[1]].flatten(1).unsqueeze(1)

    def _by_rank(self, query: Tensor, key: Tensor, value: Tensor, parts: list[tuple[int, int]]) -> list[Tensor]:
        """For each part what every rank receives of it [CP, t / CP, heads and twice groups, d], padded with zeros."""
        total = self.parallel * self.groups
        times = (query.shape[1] if self.groups == self.heads else total) // key.shape[1]
        if times > 1:
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        heads, groups = map(list, zip(*parts, strict=True))
        each = [
            pad(x, (0, 0, 0, self.parallel * sum(sizes) - x.shape[1])).unflatten(1, (self.parallel, -1)).split(sizes, 2)
            for x, sizes in ((query, heads), (key, groups), (value, groups))
        ]
        return [torch.cat([x.transpose(0, 1) for x in part], dim=2) for part in zip(*each, strict=True)]

    def _start(self, by_rank: Tensor) -> Callable[[], Tensor]:
        """Start to send `by_rank[n]` to rank n; returns what waits for all that arrives, in the same shape."""
        exchange = _Exchange()
        return partial(_Finish.apply, _Start.apply(by_rank, exchange), exchange)


class _Exchange:
    """An all-to-all among context-parallel ranks that goes on while the GPU computes."""

    def start(self, by_rank: Tensor) -> Tensor:
        received, group = torch.empty_like(by_rank), parallel_state.get_context_parallel_group()
        self.work = torch.distributed.all_to_all_single(received, by_rank, group=group, async_op=True)
        return received

    def finish(self) -> None:
        self.work.wait()
        self.work = None  # it holds both tensors, and autograd holds this object until the backward pass


class _Start(torch.autograd.Function):
    """Starts an exchange; in the backward pass it ends that of the gradient, which `_Finish` has started."""

    @staticmethod
    def forward(ctx, by_rank: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(by_rank.contiguous())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.finish()
        return grad, None


class _Finish(torch.autograd.Function):
    """Ends an exchange; in the backward pass it starts that of the gradient."""

    @staticmethod
    def forward(ctx, received: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.start(grad.contiguous()), None


def heads_of_rank(heads: int, groups: int, ranks: int) -> tuple[int, int]:
    """Heads, and groups of keys and values, on each of `ranks` context-parallel ranks.

    If heads are not divisible by ranks, they are padded. If ranks are more than groups, each group is on several of
    them; if groups cannot be divided, each head has a copy of its group.

    >>> [heads_of_rank(28, 4, ranks) for ranks in (2, 4, 8)], heads_of_rank(12, 2, 4)
    ([(14, 2), (7, 1), (4, 4)], (3, 1))
    """
    own = -(-heads // ranks)
    if heads % ranks or (groups % ranks and ranks % groups):
        return own, own
    return own, max(1, groups // ranks)


def halves_of(heads: int, groups: int) -> list[tuple[int, int]]:
    """Heads and groups of two parts of about the same size; 0 groups if those of the first part are for both.

    >>> halves_of(14, 2), halves_of(7, 1), halves_of(9, 3), halves_of(1, 1)
    ([(7, 1), (7, 1)], [(4, 1), (3, 0)], [(6, 2), (3, 1)], [(1, 1)])
    """
    if groups > 1:
        each, first = heads // groups, (groups + 1) // 2
        return [(each * first, first), (each * (groups - first), groups - first)]
    return [((heads + 1) // 2, 1), (heads // 2, 0)][: min(2, heads)]


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

        shapes = dict.fromkeys([(self.heads, self.groups), *(self.halves if self.parallel > 1 else [])])
        self.packed, self.dense = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for heads, groups in shapes:
            kernel = partial(
                DotProductAttention, heads, config.kv_channels, num_gqa_groups=max(1, groups), attention_dropout=0.0,
                softmax_scale=self.scale,
            )  # fmt: skip
            self.packed[str(heads)] = kernel(qkv_format="thd", attn_mask_type="padding_causal")
            self.dense[str(heads)] = kernel(qkv_format="sbhd", attn_mask_type="causal")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, samples: Samples) -> Tensor:
        heads = str(query.shape[1])
        if samples.dense:
            return self.dense[heads](query[:, None], key[:, None], value[:, None]).view_as(query)
        return self.packed[heads](
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
