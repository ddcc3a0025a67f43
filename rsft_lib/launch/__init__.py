"""Start ranks outside this process: on this machine under torchrun, or on a cluster with Slurm."""

import fcntl
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsft_lib.artifact import write_json
from rsft_lib.launch.job import ERRORS, Job, RunFailed, cause, read_job
from rsft_lib.launch.local import LocalJob, birth, start_torchrun
from rsft_lib.paths import resolve
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.watchdog import STACKS

PATIENCE = 30  # seconds that ranks which save nothing have to stop


def start_training(config: TrainConfig, nproc: int, on_interrupt: str = "stop") -> Job:
    """Start a training in its run folder `config.output`, or find the one that runs there; returns at once.

    Raises:
        ValueError: the ranks do not fit the settings; nothing has started then.
    """
    config.data_parallel(nproc)
    output = resolve(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        if job := attach(output):
            return job
        _clear(output)
        write_json(output / "config.json", config.to_json())
        arguments = ["--config", str(output / "config.json")]
        process = start_torchrun(
            "rsft_lib.training.train", arguments, nproc, output / "train.log", config.save_timeout,
            alone=on_interrupt == "leave",
        )  # fmt: skip
        job = LocalJob(
            output, process.pid, birth(process.pid), process,
            train_iters=config.train_iters, on_interrupt=on_interrupt, patience=config.save_timeout,
        )  # fmt: skip
        job.remember(pid=job.pid, birth=job.birth)
    return job


def attach(run: str | Path) -> Job | None:
    """The training that runs in a run folder, whoever started it; None if none does."""
    facts = read_job(resolve(run))
    if not facts:
        return None
    facts.pop("launcher")
    job = LocalJob(resolve(run), **facts)
    return job if job.running else None


def launch_training(config: TrainConfig, nproc: int, poll: Callable[[], None] = lambda: None) -> None:
    """Train on `nproc` ranks of this machine to the end, or go on where the run folder `config.output` stands.

    Interrupted, it lets the ranks finish their step and save. `training.loop.read_ended` tells why a run ended.

    Raises:
        ValueError: the ranks do not fit the settings; nothing has started then.
        RunFailed: the training failed; the message begins with the traceback.
    """
    start_training(config, nproc).wait(poll)


def launch_scoring(checkpoint: str | Path, data: str | Path, output: str | Path, nproc: int) -> None:
    """Write the loss of every trained token of tokenized data under a checkpoint into the folder `output`.

    `training.score.TokenLosses` reads it.

    Raises:
        RunFailed: the scoring failed; the message begins with the traceback.
    """
    folder = resolve(output)
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(folder)]
    launch("rsft_lib.training.score", arguments, nproc, folder.with_name(f"{folder.name}.log"))


def launch(
    module: str,
    arguments: list[str],
    nproc: int,
    log: Path,
    poll: Callable[[], None] = lambda: None,
    patience: float = PATIENCE,
) -> None:
    """Run `python -m module arguments` on `nproc` ranks of this machine and wait for all of them.

    Args:
        log: file for the output of every rank.
        poll: called twice a second while they run.
        patience: seconds that the ranks have to stop when this process is interrupted.

    Raises:
        RunFailed: a rank failed; the message begins with its traceback and names the log.
    """
    process = start_torchrun(module, arguments, nproc, log, patience)
    try:
        _wait(process, poll)
    except BaseException:
        _stop(process, patience + 10)  # torchrun kills first; were it dead by then, nobody would
        raise
    if process.returncode:
        raise RunFailed(f"{cause(log)}\n\n{module} failed (exit code {process.returncode}); the whole log is {log}")


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Let one process at a time look whether a training runs in a folder, and start one."""
    with (output / ".starting").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _clear(output: Path) -> None:
    """Remove what tells how the training before this one ended."""
    for name in ("ended.json", "stopping"):
        (output / name).unlink(missing_ok=True)
    for name in (STACKS, ERRORS):
        shutil.rmtree(output / name, ignore_errors=True)


def _wait(process: subprocess.Popen, poll: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(timeout=0.5)
            poll()
            return
        except subprocess.TimeoutExpired:
            poll()


def _stop(process: subprocess.Popen, seconds: float) -> None:
    process.terminate()  # torchrun passes it on to its ranks
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # and the ranks die with their parent
        process.wait()
