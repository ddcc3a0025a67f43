"""Load balance of data-parallel ranks, with packs distributed in order and by cost:

    RSFT_REAL_DATA=FOLDER python benchmarks/balance.py

On the real traces at 16,384 positions, with global batches of 128 packs. Packs differ only in the cost of attention,
which is the fraction ATTENTION of the mean time (DeepSeek-R1-Distill-Qwen-1.5B on an H200, train_gpu.py). Efficiency:
mean over maximum of the ranks' times.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from train_gpu import LENGTH, make_inputs

from rsft_lib.data.packed import PackedDataset, rank_share
from rsft_lib.data.store import TokenStore

BATCH, STEPS, ATTENTION = 128, 20, 0.31


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, help="folder in which to keep the tokenized inputs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.inputs or Path(temporary)
        make_inputs(folder)
        data = PackedDataset(TokenStore(folder / "traces"), LENGTH, 0)
        mean = statistics.fmean(data.costs)
        times = [1 - ATTENTION + ATTENTION * cost / mean for cost in data.costs]
        print(f"{len(data)} packs; max/min time {max(times) / min(times):.2f}")
        print(f"{'ranks':>5} {'in order':>9} {'by cost':>8}")
        for ranks in (2, 4, 8, 16, 32, 64):
            pairs = [efficiencies(data, times, data.step(step, BATCH), ranks) for step in range(STEPS)]
            print(f"{ranks:5}" + "".join(f"{statistics.fmean(column):9.3f}" for column in zip(*pairs, strict=True)))


def efficiencies(data: PackedDataset, times: list[float], packs: list[int], ranks: int) -> tuple[float, float]:
    """(in order, by cost) for one global batch."""
    costs = [data.cost(index) for index in packs]
    by_cost = [[i for batch in rank_share(packs, costs, 1, rank, ranks) for i in batch] for rank in range(ranks)]
    in_order = [packs[rank::ranks] for rank in range(ranks)]
    return tuple(_efficiency([sum(times[i] for i in share) for share in shares]) for shares in (in_order, by_cost))


def _efficiency(loads: list[float]) -> float:
    return statistics.fmean(loads) / max(loads)


if __name__ == "__main__":
    main()
