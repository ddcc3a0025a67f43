"""What a machine reaches in matrix products, attention, copies and exchanges, measured once and kept in a file.

    python -m rsft_lib.training.rates [--gpus 4]        measure in about 20 seconds, and write the file

Rates are those of a training: each operation is repeated for a while, so that a GPU at its power limit slows down as it
does in a step.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from rsft_lib.common.artifact import write_json
from rsft_lib.model.attention import TEAttention, TorchAttention, samples_of
from rsft_lib.model.cpu_shim import device, gpu
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import resolve_backend
from rsft_lib.training.flops import PEAKS, peak_flops


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU in a training."""

    device: str
    memory: int
    """Bytes."""
    products: float
    """FLOP/s of matrix products in bf16."""
    attention: float
    """FLOP/s of causal attention over very long samples, forward and backward."""
    half_length: float
    """Tokens of a sample at which attention reaches half of that."""
    copy: float
    """Bytes/s read and written by operations on elements."""
    links: dict[int, float] = field(default_factory=dict)
    """Ranks -> bytes/s that each sends in a ring all-reduce among them (its bus bandwidth)."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    network: float = 50e9
    """Bytes/s between machines for each GPU; not measured but assumed: one 400 Gb/s InfiniBand adapter per GPU."""
    host: float = 5.0e-3
    """Seconds in which a CPU starts the kernels of one layer, forward and backward."""
    source: str = ""
    """Where these come from."""

    def link(self, size: int) -> float:
        """The bus bandwidth among `size` ranks; the nearest size that was measured."""
        return self.links[min(self.links, key=lambda known: abs(known - size))] if self.links else self.copy / 20

    def link_across(self, ranks: int, size: int) -> float:
        """The same for `size` of `ranks` consecutive ranks: if these are on several machines, the ring crosses between
        them over the adapters of all its GPUs of a machine."""
        within, adapters = self.link(size), size * self.gpus_per_node / ranks
        return within if ranks <= self.gpus_per_node else min(within, adapters * self.network)


# Fitted to step times measured on H100s (benchmarks/NOTES.md, "The advisor"), not to isolated kernels.
H100 = Rates(
    "H100", 81_559 * 2**20, products=686e12, attention=475e12, half_length=1780, copy=3.02e12,
    links={2: 162e9, 4: 274e9}, source="defaults, from trainings on H100",
)  # fmt: skip
H200 = dataclasses.replace(
    H100, device="H200", memory=143_771 * 2**20, copy=4.24e12, source="those of an H100 with an H200's memory"
)


def rates_file() -> Path:
    """Where this machine's rates are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "rsft_lib" / f"rates-{(gpu() or ('cpu', 0))[0].replace(' ', '-')}.json"


def read_rates(path: Path | None = None) -> Rates:
    """The measured rates of this machine, else the defaults for its GPU, else those of an H100.

    Raises:
        ValueError: `path` is not a file of rates.
    """
    path = path or (rates_file() if rates_file().exists() else None)
    if path is None:
        return _defaults()
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        return Rates(
            **given | {"links": {int(size): rate for size, rate in given["links"].items()}, "source": str(path)}
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of rates ({error}): write it with python -m {__spec__.name}") from error


def _defaults() -> Rates:
    """Those of an H100 or H200; for another GPU with a known peak, products and attention in proportion to it."""
    name, memory = gpu() or ("", 0)
    known, peak = H200 if "H200" in name else H100, peak_flops() or PEAKS["H100"]
    if peak == PEAKS["H100"]:
        return dataclasses.replace(known, memory=memory or known.memory)
    faster = peak / PEAKS["H100"]
    return dataclasses.replace(
        known, device=name, memory=memory, products=known.products * faster, attention=known.attention * faster,
        source=f"those of an H100, products and attention in proportion to the peak of this {name}",
    )  # fmt: skip


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--output", type=Path, default=rates_file())
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={arguments.gpus or 1}",
        ]
        sys.exit(subprocess.run([*launch, "-m", "rsft_lib.training.rates", *sys.argv[1:]], check=False).returncode)
    with ranks():
        found = measure() if torch.cuda.is_available() else measure(size=512, length=512, seconds=0.1)
        if torch.distributed.get_rank() == 0:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.output, {**dataclasses.asdict(found), "source": "measured"})
            print(f"{arguments.output}: {found}", flush=True)


if __name__ == "__main__":
    main()
