"""Run a module under torchrun, so that whoever is killed leaves no process behind.

The chain is notebook kernel -> torchrun -> ranks. torchrun puts its ranks into sessions of their own, so no signal
to a process group reaches them; instead every link asks the kernel to be told when the one before it dies.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rsft_lib.artifact import write_json
from rsft_lib.lifeline import die_with_parent
from rsft_lib.paths import resolve
from rsft_lib.training.config import TrainConfig

# Seconds between asking torchrun to stop and killing it. After 30 it kills the ranks that do not listen; were it
# dead by then, nobody would.
GRACE = 40


def launch(module: str, arguments: list[str], nproc: int, log: Path, poll: Callable[[], None] = lambda: None) -> None:
    """Run `python -m module arguments` on `nproc` ranks of this machine and wait for all of them.

    Args:
        log: file for the output of every rank.
        poll: called twice a second while they run.

    Raises:
        RuntimeError: a rank failed; the message has its traceback and names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        "-m", module, *arguments,
    ]  # fmt: skip
    # A file and not a pipe: a pipe that nobody reads any more keeps its writers alive.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the notebook is for us to handle
            preexec_fn=die_with_parent,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )
        try:
            _wait(process, poll)
        except BaseException:
            _stop(process)
            raise
    if process.returncode:
        raise RuntimeError(f"{module} failed (exit code {process.returncode}); the whole log is {log}\n{_cause(log)}")


def launch_training(config: TrainConfig, nproc: int, poll: Callable[[], None] = lambda: None) -> None:
    """Train on `nproc` ranks of this machine, or go on where the run folder `config.output` stands.

    Raises:
        ValueError: the ranks do not fit the settings; nothing has started then.
        RuntimeError: the training failed; the message has the traceback.
    """
    config.data_parallel(nproc)
    output = resolve(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config.to_json())
    arguments = ["--config", str(output / "config.json")]
    launch("rsft_lib.training.train", arguments, nproc, output / "train.log", poll)


def _wait(process: subprocess.Popen, poll: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(timeout=0.5)
            poll()
            return
        except subprocess.TimeoutExpired:
            poll()


def _stop(process: subprocess.Popen) -> None:
    process.terminate()  # torchrun passes it on to its ranks
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        process.kill()  # and the ranks die with their parent
        process.wait()


def _cause(log: Path, lines: int = 40) -> str:
    """The traceback of the rank that failed first, as torchrun reports it, else the end of what the ranks wrote."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    cause = text.rpartition("Root Cause (first observed failure):")[2]
    if "Traceback" not in cause:  # torchrun knows it only of modules that use `record`
        cause = re.split(r"^[EW]\d{4} .*elastic/multiprocessing/api\.py", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(cause.rstrip().splitlines()[-lines:])
