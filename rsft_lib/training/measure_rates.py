"""Measure the rates of this machine, on each of its ranks; `python -m rsft_lib.training.rates` launches them.

Rates are those of a training: each operation is repeated for a while, so that a GPU at its power limit slows down as it
does in a step.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from rsft_lib.common.artifact import write_json
from rsft_lib.common.device import device, gpu
from rsft_lib.model.attention import TEAttention, TorchAttention, samples_of
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import resolve_backend
from rsft_lib.training.rates import Rates


def measure(size: int = 8192, length: int = 65536, seconds: float = 1.0) -> Rates:
    """Measure this rank's rates; collective over all ranks.

    Args:
        size: rows of the matrices that are multiplied.
        length: tokens of the longest sample; the other one has an eighth.
    """
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))
    products = 2 * size**3 / seconds_of(lambda: left @ right, seconds)
    copied = torch.empty_like(left).copy_
    long, short = (_attention(n, dtype, seconds) for n in (length, length // 8))
    # rate(l) = a l / (l + h) at both lengths; without a gain with length, h is 0
    half = min(max(0.0, (long - short) / (short / (length // 8) - long / length)), length)
    name, memory = gpu() or ("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Rates(
        name, memory, products=products, attention=long * (1 + half / length), half_length=half,
        copy=2 * left.nbytes / seconds_of(lambda: copied(left), seconds), links=_links(left, seconds),
    )  # fmt: skip


def _attention(length: int, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of this kit's attention over one sample, causal, forward and backward."""
    heads, groups, width = 12, 2, 128
    config = SimpleNamespace(
        context_parallel_size=1, no_rope_freq=None, softmax_scale=None, tensor_model_parallel_size=1,
        num_attention_heads=heads, kv_channels=width, num_query_groups=groups,
    )  # fmt: skip
    kind = TEAttention if resolve_backend("auto") == "te" else TorchAttention
    attention, samples = kind(config, 1, None, "self"), samples_of([0, length], device())
    query, key, value = (
        torch.randn(length, 1, n, width, device=device(), dtype=dtype, requires_grad=True)
        for n in (heads, groups, groups)
    )

    def both() -> None:
        attention(query, key, value, attention_bias=samples).sum().backward()

    return 6 * heads * width * length**2 / seconds_of(both, seconds)


def _links(tensor: torch.Tensor, seconds: float) -> dict[int, float]:
    """Bus bandwidth of all-reduce among 2, 4, ... ranks; the first ranks take part."""
    world, found = torch.distributed.get_world_size(), {}
    for size in (2**n for n in range(1, world.bit_length()) if 2**n <= world):
        group = torch.distributed.new_group(list(range(size)))
        if torch.distributed.get_rank() < size:
            reduce = lambda group=group: torch.distributed.all_reduce(tensor, group=group)  # noqa: E731
            taken = torch.tensor([seconds_of(reduce, seconds, times=20)])
            found[size] = 2 * (size - 1) / size * tensor.nbytes / taken.item()
        torch.distributed.barrier()
    return found


def seconds_of(operation: Callable[[], object], seconds: float, times: int = 0) -> float:
    """Mean time of an operation, repeated `times` times or for `seconds`."""
    for _ in range(2):
        operation()
    _wait()
    began = time.perf_counter()
    operation()
    _wait()
    times = times or max(1, round(seconds / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(times):
        operation()
    _wait()
    return (time.perf_counter() - began) / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON file")
    output = parser.parse_args().output
    with ranks():
        found = measure() if torch.cuda.is_available() else measure(size=512, length=512, seconds=0.1)
        if torch.distributed.get_rank() == 0:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, {**dataclasses.asdict(found), "source": "measured"})
            print(f"{output}: {found}", flush=True)


if __name__ == "__main__":
    main()
