"""Ranks on this machine, under torchrun.

The chain is notebook kernel -> torchrun -> ranks. torchrun puts its ranks into sessions of their own, so no signal
to a process group reaches them; instead every link asks the kernel to be told when the one before it dies. A training
that shall go on without the notebook has no such link at its beginning.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from rsft_lib.launch.job import Job
from rsft_lib.lifeline import die_with_parent


def start_torchrun(
    module: str, arguments: list[str], nproc: int, log: Path, patience: float, alone: bool = False
) -> subprocess.Popen:
    """Start `python -m module arguments` on `nproc` ranks whose output goes to `log`.

    Args:
        patience: seconds that ranks have to stop when torchrun is asked to.
        alone: whether they outlive this process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
        "-m", module, *arguments,
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(patience)),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # memory is not lost between blocks of other sizes
        **os.environ,
    }
    # A file and not a pipe: a pipe that nobody reads any more keeps its writers alive.
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the notebook is for us to handle
            preexec_fn=None if alone else die_with_parent,
            env=environment,
        )


class LocalJob(Job):
    """A training under a torchrun of this machine."""

    launcher = "local"

    def __init__(self, folder: Path, pid: int, birth: str, process: subprocess.Popen | None = None, **common):
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
        return f"exit code {self.process.returncode}" if self.process else "ended"

    def stop(self) -> None:
        """Ask all ranks to save after the step that runs, and end. It returns at once; only the first call counts."""
        if not self.running or (self.folder / "stopping").exists():
            return
        (self.folder / "stopping").touch()
        # The ranks and not torchrun, which would report as its own failure that it was asked to stop.
        ranks = psutil.Process(self.pid).children()
        for process in ranks or [psutil.Process(self.pid)]:
            process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self.running:
            torchrun = psutil.Process(self.pid)
            for process in [*torchrun.children(recursive=True), torchrun]:
                process.kill()
            while self.running:
                time.sleep(0.01)

    def _pause(self) -> None:
        if not self.process:
            return super()._pause()
        try:
            self.process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            pass


def birth(pid: int) -> str:
    """When a process began, as no other with its number did; empty if it is not there or has ended.

    That is the boot of the machine and the clock tick since then, from /proc (proc(5), Linux).
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"
