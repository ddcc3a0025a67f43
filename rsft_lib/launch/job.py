"""A training that runs on its own: whoever holds its handle can watch it, wait for it and ask it to stop."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from rsft_lib.artifact import write_json
from rsft_lib.training.watchdog import read_stacks

JOB = "job.json"
ERRORS = "errors"
ON_INTERRUPT = ("stop", "leave")
END = 2**20  # bytes at the end of a log in which the cause of a failure is looked for


class RunFailed(RuntimeError):
    """A rank failed. A notebook shows what it said, and not where this process waited for it."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Job:
    """A training in its run folder; `local.LocalJob` and `slurm.SlurmJob` know how to reach it.

    What they add: `running`, whether it has not ended yet; `state`, the same in words; `stop()`, which asks it to save
    and end; `kill()`.
    """

    launcher = ""

    def __init__(self, folder: Path, train_iters: int, on_interrupt: str, patience: float):
        self.folder, self.log = Path(folder), Path(folder) / "train.log"
        self.train_iters, self.on_interrupt, self.patience = train_iters, on_interrupt, patience

    @property
    def ended(self) -> dict:
        """Why it ended (`reason`) and after which step (`iteration`); empty while it runs, or when it failed."""
        from rsft_lib.training.loop import read_ended  # imports all that trains

        return read_ended(self.folder)

    def wait(self, poll: Callable[[], None] = lambda: None) -> None:
        """Wait until it ends, calling `poll` twice a second.

        Interrupted, also by an error in `poll`, it does what `on_interrupt` says: "stop" lets the job save and end
        first, for at most `patience` seconds; "leave" lets it run on.

        Raises:
            RunFailed: it ended without being asked to; the message begins with the traceback of the first that failed.
        """
        try:
            while self.running:
                poll()
                self._pause()
            poll()
        except BaseException:
            self._interrupted()
            raise
        if not self.ended:
            raise RunFailed(self._failure())

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log; however long it is, only its end is read."""
        return "\n".join(read_end(self.log, 400 * lines).splitlines()[-lines:])

    def remember(self, **facts) -> None:
        """Write what `attach` needs into the run folder."""
        known = {"launcher": self.launcher, "train_iters": self.train_iters}
        known |= {"on_interrupt": self.on_interrupt, "patience": self.patience}
        write_json(self.folder / JOB, known | facts)

    def _pause(self) -> None:
        time.sleep(0.5)

    def _interrupted(self) -> None:
        if self.on_interrupt == "leave":
            print(f"training goes on ({self.state}); run this notebook again to come back to it", flush=True)
            return
        self.stop()
        deadline = time.monotonic() + self.patience + 10
        while self.running and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.running:
            self.kill()

    def _failure(self) -> str:
        return f"{cause(self.log)}\n\ntraining failed ({self.state}); the whole log is {self.log}"


def read_job(folder: Path) -> dict:
    """What `remember` wrote; empty where nothing was started."""
    path = Path(folder) / JOB
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def read_end(path: Path, size: int) -> str:
    """The last `size` bytes of a file as text; empty where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return file.read(size).decode("utf-8", errors="replace")


def cause(log: Path, lines: int = 40) -> str:
    """What the rank that failed first said: the stacks of a run that hung, a traceback as `record` wrote it or as
    torchrun reports it, or the end of what the ranks wrote.
    """
    if stacks := read_stacks(log.parent):
        return f"no progress; where the ranks stood:\n{stacks}"
    files = sorted((log.parent / ERRORS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if files:
        message = json.loads(files[0].read_text(encoding="utf-8"))["message"]
        return f"{files[0].stem}: {message['extraInfo']['py_callstack'].rstrip()}"
    text = read_end(log, END).rstrip()
    said = text.rpartition("Root Cause (first observed failure):")[2]
    if "Traceback" not in said:  # torchrun knows it only of modules that use `record`
        said = re.split(r"^[EW]\d{4} .*elastic/multiprocessing/api\.py", text, maxsplit=1, flags=re.MULTILINE)[0]
    return "\n".join(said.rstrip().splitlines()[-lines:])
