"""What test_stopping.py starts in place of rsft_lib.training.train: in its third micro-batch rank 1 does what
$RANKS_SHALL says: `sleep`, `hold the lock` of the interpreter for ever, or `fail` while rank 0 sleeps and does not
notice.

The watch's clock is set forward in place of waiting, so that no test depends on how long a micro-batch takes.
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
        libc.pthread_mutex_lock(lock)  # which no signal interrupts
    elif (WHAT, RANK, seen) == ("hold the lock", 0, 4):
        set_forward()  # and wait for rank 1 in a collective
    elif (WHAT, RANK, seen) == ("fail", 1, 3):
        raise KeyError("broken on rank 1")
    elif (WHAT, RANK, seen) == ("fail", 0, 3):
        told = Path(watchdog._watch.folder / "told0.txt")
        while not told.read_text():  # torchrun has seen that rank 1 failed
            time.sleep(0.1)
        sleep()


def sleep() -> None:
    set_forward()
    time.sleep(600)


def set_forward() -> None:
    watchdog.clock = lambda: clock() + 600


if __name__ == "__main__":
    if WHAT == "hold the lock":  # of a watch of 45 seconds: 5 until stacks are written without the lock, and 20 more
        watchdog.LATE, watchdog.GRACE = -40, 20
    batches.beat = fall_asleep
    train.main()
