"""Ranks for tests with many runs: forked from a process that has imported everything, so that they start fast."""

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
    """Run `target(*arguments)` on separate ranks with output to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    # Like torchrun: a port that is chosen first and opened later may be taken in between.
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
        process.store = store  # keep it alive as long as the process
    return processes


def join(processes: list, log: Path, seconds: float = 600) -> None:
    """Wait for ranks. If one fails, the others are killed, like under torchrun, and the end of the log is raised.

    A rank that has not ended after `seconds` (exit code None) has failed.
    """
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        for process in processes:
            process.kill()
        raise RuntimeError(f"exit codes {codes}\n{log.read_text()[-5000:]}")


def train(config: TrainConfig, nproc: int = 1) -> None:
    """Run a whole training, like `launch_training`."""
    log = Path(config.output) / "train.log"
    join(start(train_as_rank, nproc, log, config), log)


def train_as_rank(config: TrainConfig) -> None:
    """The target of a training's ranks."""
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
        os._exit(1)  # without cleanup, in which a thread of gloo may wait for a rank that has ended
    sys.stdout.flush()
