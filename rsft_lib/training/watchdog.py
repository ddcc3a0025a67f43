"""End a run that hangs, and write the stack traces of every rank.

Collectives block indefinitely when a rank stops responding, and saves when a disk hangs. A watchdog thread in every
rank checks a deadline. When it expires, the thread writes the stacks of all threads, notifies the other ranks through a
file, waits for their stacks, and ends the process; without the wait torchrun would end the other ranks too early.

If a C call holds the GIL, no Python thread runs. Then faulthandler's timer writes the stacks and the kernel's interval
timer ends the process; neither needs the GIL.
"""

import faulthandler
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

START = 600  # seconds until the first beat, for kernel compilation and rendezvous
PATIENCE = 8  # timeout as a multiple of the longest interval between beats in this and the previous step
LOOK = 1.0  # seconds between checks of the clock and of the file, which may be on a shared file system
LATE = 10  # seconds after a deadline until stacks are written without the GIL
GRACE = 30  # seconds that a rank waits for the stacks of the others
STACKS = "stacks"
FIRED = "fired.txt"  # which rank timed out first; empty otherwise

clock = time.monotonic


class _Watch:
    """The watchdog of this process; there is only one, since faulthandler has only one timer."""

    file: TextIO  # for the stacks; open within `watched`

    def __init__(self, folder: Path, rank: int, ranks: int, least: float):
        self.folder, self.rank, self.ranks, self.least = folder, rank, ranks, least
        self.last, self.slowest, self.before = 0.0, 0.0, 0.0
        self.in_deadline, self.begun = False, False
        self.due, self.granted = math.inf, 0.0

    def arm(self, seconds: float) -> None:
        """Set the deadline of the next beat, for the thread and for the timers that do not need the GIL."""
        if not self.least:
            return
        faulthandler.cancel_dump_traceback_later()  # also waits until it has finished writing stacks
        if os.fstat(self.file.fileno()).st_size and not self.fired():
            self.file.truncate(0)  # the timer wrote stacks of a call that has returned after all
        self.due, self.granted = clock() + seconds, seconds
        faulthandler.dump_traceback_later(seconds + LATE, file=self.file)
        signal.setitimer(signal.ITIMER_REAL, seconds + LATE + GRACE)  # SIGALRM ends the process

    def look(self, over: threading.Event) -> None:
        """The watchdog thread, until the block is `over`."""
        while not over.wait(LOOK):
            if clock() > self.due:
                self.give_up(f"no progress for {self.granted:.0f} s")
            with suppress(OSError):  # a file system error may be temporary
                if by := self.fired():
                    self.give_up(f"at this time {by}")

    def fired(self) -> str:
        """Which rank timed out first, and why; empty if none has."""
        return (self.folder / FIRED).read_text(errors="replace")

    def give_up(self, why: str) -> None:
        """Write the stacks, have the other ranks write theirs, and end the process."""
        try:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 2 * GRACE)  # in case the disk hangs
            self.file.write(f"{why}\n")
            self.file.flush()
            faulthandler.dump_traceback(self.file)
            os.fsync(self.file.fileno())
            (self.folder / FIRED).write_text(f"rank {self.rank} noticed: {why}")
            until = time.monotonic() + GRACE
            while time.monotonic() < until and not all(map(self._written, range(self.ranks))):
                time.sleep(LOOK / 10)
        finally:
            os._exit(1)

    def _written(self, rank: int) -> bool:
        """Whether a rank has written its stacks, or has ended by itself and removed its file."""
        path = self.folder / f"rank{rank}.txt"
        return not path.exists() or bool(path.read_bytes())  # read it, since NFS caches the size


_watch = _Watch(Path(), rank=0, ranks=1, least=0)  # until a run begins; never armed


@contextmanager
def watched(folder: Path, rank: int, ranks: int, seconds: int) -> Iterator[None]:
    """Within the block, end this process if there is no `beat` for `seconds`, or longer if micro-batches take long.

    It writes its stacks to `folder/stacks/rank<rank>.txt`, and so do the other ranks. On SIGTERM, which a kill may
    follow, a rank writes its stack to `sigterm<rank>.txt`. `seconds` 0 disables the watchdog.
    """
    global _watch
    _watch = _Watch(folder / STACKS, rank, ranks, seconds)
    if not seconds:
        yield
        return
    _watch.folder.mkdir(parents=True, exist_ok=True)
    on_hang, on_sigterm = (_watch.folder / f"{name}{rank}.txt" for name in ("rank", "sigterm"))
    for path in (_watch.folder / FIRED, on_hang, on_sigterm):
        path.write_text("")  # remove stacks of a previous run; no rank of this one can have timed out yet
    with on_hang.open("a") as _watch.file, on_sigterm.open("a") as file:
        over = threading.Event()
        thread = threading.Thread(target=_watch.look, args=[over], name="watchdog", daemon=True)
        _watch.arm(START)
        faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # does not return after a timeout: the thread ends the process
            faulthandler.unregister(signal.SIGTERM)
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            on_hang.unlink(missing_ok=True)
            _watch.least = 0
    on_sigterm.unlink(missing_ok=True)


def beat() -> None:
    """Record progress of this rank; called for every micro-batch."""
    now = clock()
    _watch.begun = True
    if _watch.last:
        _watch.slowest = max(_watch.slowest, now - _watch.last)
    _watch.last = now
    _watch.arm(max(_watch.least, PATIENCE * _watch.slowest, PATIENCE * _watch.before))


def end_step() -> None:
    """Record the end of a step; only the last two steps count, since the first one includes kernel compilation."""
    beat()
    _watch.before, _watch.slowest = _watch.slowest, 0.0


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Allow `seconds` for the block instead of the usual timeout between two beats.

    A nested block has no effect: the deadline of the outer one remains.
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
    _watch.last = 0.0  # do not count the block as a micro-batch
    beat()


def read_stacks(folder: Path) -> dict[str, str]:
    """Stacks in a run folder by rank, `rank 0`; empty if the run did not hang.

    For a rank that was ended before its watchdog fired, it is the stack at SIGTERM.
    """
    on_hang, on_sigterm = (_read(folder / STACKS, name) for name in ("rank", "sigterm"))
    return {f"rank {rank}": text for rank, text in sorted((on_sigterm | on_hang).items())} if on_hang else {}


def _read(folder: Path, name: str) -> dict[int, str]:
    """Contents of the non-empty files `<name><rank>.txt`, by rank."""
    texts = {path.stem: path.read_text(errors="replace").rstrip() for path in folder.glob(f"{name}*.txt")}
    return {int(stem.removeprefix(name)): text for stem, text in texts.items() if text}
