"""Attention of context-parallel ranks, as threads of one process and in one autograd graph."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch
from torch import Tensor

from rsft_lib.model.attention import Samples


def attention(kind: type, heads: int = 12, groups: int = 2, width: int = 128, ranks: int = 1) -> torch.nn.Module:
    config = SimpleNamespace(
        context_parallel_size=ranks, tensor_model_parallel_size=1, num_attention_heads=heads, num_query_groups=groups,
        kv_channels=width, softmax_scale=None, no_rope_freq=None,
    )  # fmt: skip
    return kind(config, 1, None, "self")


def attend(kind: type, query: Tensor, key: Tensor, value: Tensor, samples: Samples, ranks: int = 1) -> Tensor:
    """[t, heads, d] and [t, groups, d] twice -> [t, heads * d], computed by `ranks` ranks."""
    barrier, given = threading.Barrier(ranks), {}
    tokens = [x.unsqueeze(1).chunk(ranks) for x in (query, key, value)]

    def work(rank: int) -> Tensor:
        module = attention(kind, query.shape[1], key.shape[1], query.shape[2], ranks)

        def exchange(by_rank: Tensor) -> Tensor:
            given[rank] = by_rank.unbind()
            barrier.wait(60)
            received = torch.stack([given[other][rank] for other in range(ranks)])
            barrier.wait(60)
            return received

        module._exchange = exchange
        return module(*(x[rank] for x in tokens), attention_bias=samples).squeeze(1)

    with ThreadPoolExecutor(ranks) as threads:
        return torch.cat(list(threads.map(work, range(ranks))))
