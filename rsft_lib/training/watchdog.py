"""A run that makes no progress ends, and every rank leaves the stack that it stood at.

Collectives wait for ever for a rank that sleeps, and a save for a disk that does. Python's faulthandler watches from a
thread of its own that needs no interpreter lock: when a deadline passes it writes the stacks of all threads and exits.
"""

import faulthandler
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START = 600  # seconds until the first beat, in which kernels are compiled and ranks find each other
PATIENCE = 8  # times the longest wait of this step and the one before
STACKS = "stacks"


class _Watch:
    """The one watch of this process: faulthandler has only one timer."""

    def __init__(self):
        self.file, self.least = None, 0
        self.last, self.slowest, self.before = 0.0, 0.0, 0.0
        self.in_deadline, self.begun = False, False

    def arm(self, seconds: float) -> None:
        if self.file and self.least:
            faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)


_watch = _Watch()


@contextmanager
def watched(folder: Path, rank: int, seconds: int) -> Iterator[None]:
    """Within the block, end this process when no `beat` comes for `seconds`; longer where micro-batches take long.

    Its stacks are in `folder/stacks/rank<rank>.txt` then. With 0 seconds nothing is watched.
    """
    path = folder / STACKS / f"rank{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        _watch.__init__()
        _watch.file, _watch.least = file, seconds
        _watch.arm(START)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            _watch.file = None
    path.unlink()


def beat() -> None:
    """Say that this rank made progress: called for every micro-batch."""
    now = time.monotonic()
    _watch.begun = True
    if _watch.last:
        _watch.slowest = max(_watch.slowest, now - _watch.last)
    _watch.last = now
    _watch.arm(max(_watch.least, PATIENCE * _watch.slowest, PATIENCE * _watch.before))


def end_step() -> None:
    """Say that a step is done; the first one compiled kernels, so what its micro-batches took is soon forgotten."""
    beat()
    _watch.before, _watch.slowest = _watch.slowest, 0.0


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Give what is done in the block this long, in place of the usual patience between two beats.

    A block within another is a part of it: the outer one's time runs on.
    """
    if _watch.in_deadline:
        yield
        return
    _watch.in_deadline = True
    _watch.arm(seconds)
    try:
        yield
    finally:
        _watch.in_deadline = False
    if not _watch.begun:
        _watch.arm(START)
        return
    _watch.last = 0.0  # what took long here is no measure for a micro-batch
    beat()


def read_stacks(folder: Path) -> str:
    """The stacks that ranks left in a run folder, with their names; empty when none did."""
    found = {path.name: path.read_text(errors="replace") for path in sorted((folder / STACKS).glob("rank*.txt"))}
    return "\n".join(f"{name}\n{text.rstrip()}" for name, text in found.items() if text.strip())
