"""What a machine reaches in matrix products, attention, copies and exchanges, measured once and kept in a file.

    python -m rsft_lib.training.rates [--gpus 4]        measure in about 20 seconds, and write the file

Without that file `read_rates` returns defaults for the GPU.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rsft_lib.common.device import gpu
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--output", type=Path, default=rates_file())
    arguments = parser.parse_args()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus or 1}"]
    measured = subprocess.run([*launch, "-m", "rsft_lib.training.measure_rates", str(arguments.output)], check=False)
    sys.exit(measured.returncode)


if __name__ == "__main__":
    main()
