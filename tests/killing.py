"""Repeatedly kill a run at random moments and resume it: python tests/killing.py --kills 200

The run must always resume from a complete checkpoint and end like an uninterrupted one: the same weights, optimizer
states, metrics and samples, bit for bit.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import forked
import torch
from support import all_tensors, random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common.artifact import MANIFEST
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics
from rsft_lib.training.run_folder import read_ended

MEASURED = ("seconds", "tokens_per_second", "memory_gib")  # prefixes of metrics that differ between runs
RANKS = 2


def run_settings(folder: Path, name: str, steps: int) -> TrainConfig:
    """Settings of a run of many short steps that saves often and keeps few checkpoints; its inputs are made once.

    The best checkpoint, which is kept, too, is an early one.
    """
    if not (folder / "store").exists():
        shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
        tiny_model(folder / "hf", **shape)
        convert(folder / "hf", folder / "megatron")
        random_store(folder / "store", samples=80, longest=30)
        random_store(folder / "held-out", samples=8, longest=30)
    return settings(
        checkpoint=str(folder / "megatron"), data=str(folder / "store"), output=str(folder / name), seq_length=48,
        global_batch_size=2, train_iters=steps, save_interval=2, keep_last=2, keep_every=6, async_save=True,
        eval_data=str(folder / "held-out"), eval_interval=2, eval_iters=1, keep_best="eval_loss", lr=3e-2,
    )  # fmt: skip


MOMENTS = {
    "any": lambda run: True,
    "writing": lambda run: any(run.glob(".iter_*.tmp/*.distcp")),
    "finalising": lambda run: any(run.glob(".iter_*.tmp/.metadata")),
    "naming": lambda run: any(run.glob(f".iter_*.tmp/*{MANIFEST}*")),
    "removing": lambda run: any(run.glob(".iter_*.old*")),
}


def is_now(moment: str, run: Path) -> bool:
    try:
        return MOMENTS[moment](run)
    except FileNotFoundError:  # a folder was renamed during the search
        return False


def kill_once(config: TrainConfig, rng: random.Random, seconds: float) -> str:
    """Start or resume the run, and kill all its ranks at a random moment.

    Args:
        seconds: duration of a whole run.

    Returns:
        The name of the moment; '' if the run ended first.
    """
    run = Path(config.output)
    processes = forked.start(forked.train_as_rank, RANKS, run / "train.log", config)
    name = rng.choice(list(MOMENTS))
    earliest = time.monotonic() + rng.uniform(0, seconds)
    while any(process.is_alive() for process in processes):
        if time.monotonic() > earliest and is_now(name, run):
            time.sleep(rng.uniform(0, 0.01))
            for process in processes:
                process.kill()  # no error if it has just ended by itself
            for process in processes:
                process.join()
            return name
        time.sleep(0.0005)
    forked.join(processes, run / "train.log")
    return ""


def differences(found: Path, expected: Path) -> list[str]:
    """The differences of two finished runs."""
    ours, theirs = all_tensors(newest(found)), all_tensors(newest(expected))
    problems = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    for one, other in zip(read_metrics(found), read_metrics(expected), strict=True):
        problems += [
            f"step {other['iteration']}: {key} is {one.get(key)}, expected {value}"
            for key, value in other.items()
            if one.get(key) != value and not key.startswith(MEASURED) and not key.endswith("per_second")
        ]
    return problems


def survive(folder: Path, kills: int, seed: int, steps: int = 60) -> dict[str, int]:
    """Kill runs `kills` times in total and compare each one that ends.

    Returns:
        How often each moment was hit.

    Raises:
        AssertionError: a run ended differently from the uninterrupted one.
    """
    rng, counts, number = random.Random(seed), dict.fromkeys(MOMENTS, 0), 0
    forked.train(run_settings(folder, "alone", steps), RANKS)
    began = time.monotonic()
    forked.train(run_settings(folder, "timed", steps), RANKS)  # without imports, which the first run did
    seconds = time.monotonic() - began
    while sum(counts.values()) < kills:
        config = run_settings(folder, f"run{number}", steps)
        while moment := kill_once(config, rng, seconds):
            counts[moment] += 1
            if sum(counts.values()) == kills:
                forked.train(config, RANKS)
                break
        run = Path(config.output)
        assert read_ended(run) == {"reason": "finished", "iteration": steps}
        assert differences(run, folder / "alone") == []
        kept, expected = (sorted(path.name for path in place.glob("iter_*")) for place in (run, folder / "alone"))
        assert kept == expected, (kept, expected, (run / "train.log").read_text()[-3000:])
        assert not list(run.glob(".iter_*"))
        shutil.rmtree(run)
        number += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = survive(Path(folder), arguments.kills, arguments.seed)
    listed = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(
        f"{sum(counts.values())} kills ({listed}) in {time.monotonic() - began:.0f} s: all runs ended bit for bit alike"
    )


if __name__ == "__main__":
    sys.exit(main())
