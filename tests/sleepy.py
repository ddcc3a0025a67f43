"""A training with a fault, for test_stopping.py. In the third micro-batch rank 1 does what $RANKS_SHALL contains:
`sleep`, `hold the lock` (the GIL) indefinitely, or `fail` while rank 0 sleeps and does not notice.

The watchdog's clock is set forward instead of waiting, so that no test depends on the duration of a micro-batch.
"""

import ctypes
import os
import time
from pathlib import Path

from rsft_lib.training import batches, train, watchdog

WHAT, RANK = os.environ["RANKS_SHALL"], int(os.environ["RANK"])
seen = 0
beat, clock = batches.beat, watchdog.clock


def fall_asleep() -> None:
    global seen
    seen += 1
    beat()
    if (WHAT, RANK, seen) == ("sleep", 1, 3):
        sleep()
    elif (WHAT, RANK, seen) == ("hold the lock", 1, 3):
        lock, libc = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)  # not interrupted by signals
    elif (WHAT, RANK, seen) == ("hold the lock", 0, 4):
        set_forward()  # then block in a collective with rank 1
    elif (WHAT, RANK, seen) == ("fail", 1, 3):
        raise KeyError("broken on rank 1")
    elif (WHAT, RANK, seen) == ("fail", 0, 3):
        on_sigterm = Path(watchdog._watch.folder / "sigterm0.txt")
        while not on_sigterm.read_text():  # until torchrun has noticed that rank 1 failed
            time.sleep(0.1)
        sleep()


def sleep() -> None:
    set_forward()
    time.sleep(600)


def set_forward() -> None:
    watchdog.clock = lambda: clock() + 600


if __name__ == "__main__":
    if WHAT == "hold the lock":  # with hang_timeout 45: stacks without the GIL after 5 s, the end 20 s later
        watchdog.LATE, watchdog.GRACE = -40, 20
    batches.beat = fall_asleep
    train.main()
