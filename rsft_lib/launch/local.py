"""Ranks on this machine, under torchrun.

The chain is notebook kernel -> torchrun -> ranks. torchrun puts its ranks into separate sessions, which signals to a
process group do not reach; instead, every process watches its parent (torchrun.py, common/parent_death.py). For a
training that outlives the notebook, torchrun does not watch the kernel.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Unpack

import psutil

from rsft_lib.common.cores import usable_cores
from rsft_lib.launch.failure import failure, torchrun_reports
from rsft_lib.launch.job import ENVIRONMENT, TRAIN, Common, Job
from rsft_lib.launch.log import mark
from rsft_lib.training.run_folder import CONFIG, LOG, STOPPING

PATIENCE = 30  # seconds that ranks without anything to save have to stop


def start_torchrun(
    module: str, arguments: list[str], nproc: int, log: Path, patience: float, alone: bool = False
) -> subprocess.Popen:
    """Start `python -m module arguments` on `nproc` ranks with output appended to `log`.

    Args:
        patience: seconds that ranks have to stop when torchrun is asked to.
        alone: whether they outlive this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    torchrun = ["torch.distributed.run"] if alone else ["rsft_lib.launch.torchrun", str(os.getpid()), str(patience)]
    command = [
        sys.executable, "-m", *torchrun, "--standalone", f"--nproc-per-node={nproc}", "-m", module, *arguments,
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(patience)),
        **ENVIRONMENT,
        **os.environ,
    }
    mark(log, "started")
    # A file instead of a pipe: writing to a pipe without a reader would fail or block.
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the notebook is handled by this process
            env=environment,
        )


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
        RunFailed: a rank failed; the message starts with its traceback and names the log.
    """
    process = start_torchrun(module, arguments, nproc, log, patience)
    try:
        while not _ends(process, 0.5):
            poll()
        poll()
    except BaseException:
        process.terminate()  # torchrun forwards it to its ranks
        if not _ends(process, patience + 10):
            process.kill()  # the ranks die with their parent
            process.wait()
        raise
    if process.returncode:
        raise failure(module, log, f"exit code {process.returncode}")


def ask_to_stop(torchrun: int) -> bool:
    """Send SIGTERM to the ranks of a torchrun process, or to itself if it has none yet; returns whether it had any.

    With a SIGTERM to itself, torchrun up to torch 2.11 kills ranks that have not saved within 30 seconds, kills them
    immediately on a second SIGTERM, and reports the stop as its own failure.

    Raises:
        psutil.NoSuchProcess: torchrun has ended.
    """
    process = psutil.Process(torchrun)
    ranks = process.children()
    for target in ranks or [process]:
        with suppress(psutil.NoSuchProcess):  # it has ended; still signal the others
            target.send_signal(signal.SIGTERM)
    return bool(ranks)


def start(folder: Path, nproc: int, **common: Unpack[Common]) -> "LocalJob":
    """Train with the settings in `folder/config.json`."""
    arguments = ["--config", str(folder / CONFIG)]
    process = start_torchrun(
        TRAIN, arguments, nproc, folder / LOG, common["patience"],
        alone=common["on_interrupt"] == "leave",
    )  # fmt: skip
    job = LocalJob(folder, process.pid, birth(process.pid), process, **common)
    job.remember(pid=job.pid, birth=job.birth, host=socket.gethostname())
    return job


def find(folder: Path, facts: dict) -> "LocalJob | None":
    """The job with these `facts`, if it runs on this machine."""
    host = facts.pop("host")
    job = LocalJob(folder, **facts)
    return job if host == socket.gethostname() and job.running else None


class LocalJob(Job):
    """A training under torchrun on this machine."""

    launcher = "local"

    def __init__(
        self, folder: Path, pid: int, birth: str, process: subprocess.Popen | None = None, **common: Unpack[Common]
    ):
        super().__init__(folder, **common)
        self.pid, self.birth, self.process = pid, birth, process

    @property
    def running(self) -> bool:
        if self.process:
            return self.process.poll() is None
        return bool(self.birth) and birth(self.pid) == self.birth

    @property
    def state(self) -> str:
        if self.running:
            return f"running, process {self.pid} on {socket.gethostname()}"
        return f"exit code {self.process.returncode}" if self.process and self.process.returncode else "ended"

    def stop(self) -> None:
        """Ask all ranks to save after the current step and end. Returns immediately; only the first call counts."""
        if not self.running or self.stopping:
            return
        (self.folder / STOPPING).touch()
        with suppress(psutil.NoSuchProcess):
            ask_to_stop(self.pid)

    def kill(self) -> None:
        """Kill torchrun and all ranks, and wait until they have ended."""
        ranks = []
        with suppress(psutil.NoSuchProcess):
            torchrun = psutil.Process(self.pid)
            if self.running:  # otherwise its pid may have been reused
                ranks = torchrun.children(recursive=True)
                torchrun.kill()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        psutil.wait_procs(ranks, timeout=10)
        while self.running:
            time.sleep(0.01)

    def _failed(self) -> bool:
        # When one rank dies, torchrun asks the others to stop, and they may write ended.json.
        return super()._failed() or torchrun_reports(self.log)

    def _pause(self) -> None:
        if not self.process:
            return super()._pause()
        _ends(self.process, 0.5)


def _ends(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for a process for at most `seconds`; returns whether it has ended."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def birth(pid: int) -> str:
    """A unique start time of a process, which identifies it even if its pid is reused; empty if it has ended.

    It consists of the machine's boot id and the clock ticks since boot, from /proc (proc(5), Linux).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
