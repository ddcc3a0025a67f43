"""A run that makes no progress ends, and every rank leaves the stacks that it stood at.

Collectives block for ever when a rank sleeps, and a save does when a disk hangs. A thread of every rank looks at the
clock: after a deadline it writes the stacks of all threads, tells the other ranks through a file, waits until they have
written theirs, and ends the process; one that ended at once would have torchrun end the others before they write.

Where a C call keeps the interpreter's lock no thread of Python runs. Then faulthandler's timer writes the stacks, and
the kernel's alarm clock ends the process; neither needs the lock.
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

START = 600  # seconds until the first beat, in which kernels are compiled and ranks find each other
PATIENCE = 8  # times the longest wait of this step and the one before
LOOK = 1.0  # seconds between two looks at the clock and at the file, which may lie on a disk that many ranks share
LATE = 10  # seconds after a deadline at which stacks are written without the interpreter's lock
GRACE = 30  # seconds that a rank waits for the stacks of the others
STACKS = "stacks"
FIRED = "fired.txt"  # in it, who noticed first; empty while all is well

clock = time.monotonic


class _Watch:
    """The one watch of this process: faulthandler has only one timer."""

    def __init__(self, folder: Path | None = None, rank: int = 0, ranks: int = 1, least: float = 0):
        self.folder, self.rank, self.ranks, self.least = folder, rank, ranks, least
        self.last, self.slowest, self.before = 0.0, 0.0, 0.0
        self.in_deadline, self.begun = False, False
        self.due, self.granted = math.inf, 0.0

    def arm(self, seconds: float) -> None:
        """Expect a beat within `seconds`, also by the timers that need no lock."""
        if not self.least:
            return
        faulthandler.cancel_dump_traceback_later()  # waits for the stacks that it is writing
        if os.fstat(self.file.fileno()).st_size and not self.fired():
            self.file.truncate(0)  # what a timer wrote of a call that has returned, before any rank gave up
        self.due, self.granted = clock() + seconds, seconds
        faulthandler.dump_traceback_later(seconds + LATE, file=self.file)
        signal.setitimer(signal.ITIMER_REAL, seconds + LATE + GRACE)  # SIGALRM: it ends a process with no handler

    def look(self, over: threading.Event) -> None:
        """What the thread does, until the block is `over`."""
        while not over.wait(LOOK):
            if clock() > self.due:
                self.give_up(f"no progress for {self.granted:.0f} s")
            with suppress(OSError):  # a file system that fails now may answer the next time
                if by := self.fired():
                    self.give_up(f"at this time {by}")

    def fired(self) -> str:
        """Which rank gave up first, and why; empty while none has."""
        return (self.folder / FIRED).read_text(errors="replace")

    def give_up(self, why: str) -> None:
        """Write the stacks, have the others write theirs, and end the process."""
        try:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 2 * GRACE)  # should the disk be what hangs
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
        """Whether a rank has written its stacks, or ended by itself and took its file along."""
        path = self.folder / f"rank{rank}.txt"
        return not path.exists() or bool(path.read_bytes())  # reading it, since NFS keeps what stat says for a while


_watch = _Watch()


@contextmanager
def watched(folder: Path, rank: int, ranks: int, seconds: int) -> Iterator[None]:
    """Within the block, end this process when no `beat` comes for `seconds`; longer where micro-batches take long.

    Its stacks are in `folder/stacks/rank<rank>.txt` then, and the other ones of `ranks` do the same. Of a rank that is
    sent SIGTERM, `told<rank>.txt` has the stack at that moment: it may be killed next. With 0 seconds nothing is
    watched.
    """
    global _watch
    _watch = _Watch(folder / STACKS, rank, ranks, seconds)
    if not seconds:
        yield
        return
    _watch.folder.mkdir(parents=True, exist_ok=True)
    own, told = (_watch.folder / f"{name}{rank}.txt" for name in ("rank", "told"))
    for path in (_watch.folder / FIRED, own, told):
        path.write_text("")  # not what a run before has left; no other rank of this one has begun to wait
    with own.open("a") as _watch.file, told.open("a") as file:
        over = threading.Event()
        thread = threading.Thread(target=_watch.look, args=[over], name="watchdog", daemon=True)
        _watch.arm(START)
        faulthandler.register(signal.SIGTERM, file, all_threads=False, chain=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # for ever where it has given up: it ends the process
            faulthandler.unregister(signal.SIGTERM)
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            own.unlink(missing_ok=True)  # who has no stacks did not hang
            _watch.least = 0
    told.unlink(missing_ok=True)


def beat() -> None:
    """Say that this rank made progress: called for every micro-batch."""
    now = clock()
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


def read_stacks(folder: Path) -> dict[str, str]:
    """The stacks that ranks left in a run folder by the ranks' names, `rank 0`; empty when the run did not hang.

    A rank that was ended before its watch fired has the stack of that moment.
    """
    hung, told = (_read(folder / STACKS, name) for name in ("rank", "told"))
    return {f"rank {rank}": text for rank, text in sorted((told | hung).items())} if hung else {}


def _read(folder: Path, name: str) -> dict[int, str]:
    """The files `name` and a rank's number that have something in them."""
    texts = {path.stem: path.read_text(errors="replace").rstrip() for path in folder.glob(f"{name}*.txt")}
    return {int(stem.removeprefix(name)): text for stem, text in texts.items() if text}
