"""Ranks for tests that need many runs: forked from a process that has imported everything, so they start at once."""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch

from rsft_lib.training.config import TrainConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rsft_lib.training.train", "rsft_lib.evaluation.score"])


def start(target, nproc: int, log: Path, *arguments) -> list:
    """`target(*arguments)` on ranks of their own; what they print goes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    # As torchrun does it: a port that is chosen first and opened later may be another's by then.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(nproc),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    processes = [
        _context.Process(target=_rank, args=(target, {**world, "RANK": str(rank)}, log, arguments), daemon=True)
        for rank in range(nproc)
    ]
    for process in processes:
        process.start()
        process.store = store  # which lives as long as they do
    return processes


def join(processes: list, log: Path, seconds: float = 600) -> None:
    """Wait for ranks; a failure of one ends the others, as torchrun does, and is raised with the log's end.

    One that has not ended after `seconds` (its exit code is None) has failed.
    """
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        for process in processes:
            process.kill()
        raise RuntimeError(f"exit codes {codes}\n{log.read_text()[-5000:]}")


def train(config: TrainConfig, nproc: int = 1) -> None:
    """A whole training, as `launch_training` runs it."""
    log = Path(config.output) / "train.log"
    join(start(train_as_rank, nproc, log, config), log)


def train_as_rank(config: TrainConfig) -> None:
    """What each rank of a training does."""
    from rsft_lib.training.train import run

    run(config)


def _rank(target, environment: dict, log: Path, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        target(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not the orderly way: a thread of gloo may wait for a rank that is gone
    sys.stdout.flush()
