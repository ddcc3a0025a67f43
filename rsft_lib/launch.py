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
from rsft_lib.training.watchdog import read_stacks

# Seconds that ranks have to stop when asked to: torchrun kills those that take longer. Ours save a checkpoint first.
PATIENCE = 30


def launch(
    module: str,
    arguments: list[str],
    nproc: int,
    log: Path,
    poll: Callable[[], None] = lambda: None,
    patience: int = PATIENCE,
) -> None:
    """Run `python -m module arguments` on `nproc` ranks of this machine and wait for all of them.

    Args:
        log: file for the output of every rank.
        poll: called twice a second while they run.
        patience: seconds that the ranks have to stop when this process is interrupted.

    Raises:
        RuntimeError: a rank failed; the message has its traceback and names the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // nproc))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        "-m", module, *arguments,
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": threads,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(patience),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # memory is not lost between blocks of other sizes
        **os.environ,
    }
    # A file and not a pipe: a pipe that nobody reads any more keeps its writers alive.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the notebook is for us to handle
            preexec_fn=die_with_parent,
            env=environment,
        )
        try:
            _wait(process, poll)
        except BaseException:
            _stop(process, patience + 10)  # torchrun kills first; were it dead by then, nobody would
            raise
    if process.returncode:
        raise RuntimeError(f"{module} failed (exit code {process.returncode}); the whole log is {log}\n{_cause(log)}")


def launch_training(config: TrainConfig, nproc: int, poll: Callable[[], None] = lambda: None) -> None:
    """Train on `nproc` ranks of this machine, or go on where the run folder `config.output` stands.

    Interrupted, it lets the ranks finish their step and save. `training.loop.read_ended` tells why a run ended.

    Raises:
        ValueError: the ranks do not fit the settings; nothing has started then.
        RuntimeError: the training failed; the message has the traceback.
    """
    config.data_parallel(nproc)
    output = resolve(config.output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "config.json", config.to_json())
    arguments = ["--config", str(output / "config.json")]
    launch("rsft_lib.training.train", arguments, nproc, output / "train.log", poll, patience=config.save_timeout)


def launch_scoring(checkpoint: str | Path, data: str | Path, output: str | Path, nproc: int) -> None:
    """Write the loss of every trained token of tokenized data under a checkpoint into the folder `output`.

    `training.score.TokenLosses` reads it.

    Raises:
        RuntimeError: the scoring failed; the message has the traceback.
    """
    folder = resolve(output)
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(folder)]
    launch("rsft_lib.training.score", arguments, nproc, folder.with_name(f"{folder.name}.log"))


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


def _cause(log: Path, lines: int = 40) -> str:
    """What the rank that failed first said: the stacks of a run that hung, a traceback as torchrun reports it, or the
    end of what the ranks wrote.
    """
    if stacks := read_stacks(log.parent):
        return f"no progress; where the ranks stood:\n{stacks}"
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    cause = text.rpartition("Root Cause (first observed failure):")[2]
    if "Traceback" not in cause:  # torchrun knows it only of modules that use `record`
        cause = re.split(r"^[EW]\d{4} .*elastic/multiprocessing/api\.py", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(cause.rstrip().splitlines()[-lines:])
