"""Reasons to stop early: SIGTERM, SIGINT, a time limit, an alarm. After each step the ranks agree on one (`loop`)."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

REASONS = ("", "alarm", "time limit", "SIGINT", "SIGTERM")  # the last one wins if ranks differ


class Stop:
    """This rank's reason to stop so far; `reason` is an index into REASONS."""

    def __init__(self, minutes: float):
        self.reason, self.began, self.limit = 0, time.monotonic(), minutes * 60
        self.spare = 0.0

    def ask(self, name: str) -> None:
        self.reason = max(self.reason, REASONS.index(name))

    def look_at_the_clock(self, seconds: float) -> None:
        """Stop if another step as long as the longest so far would exceed the time limit; this one took `seconds`."""
        self.spare = max(self.spare, seconds)
        if self.limit and time.monotonic() - self.began + self.spare > self.limit:
            self.ask("time limit")


@contextmanager
def stopping(minutes: float) -> Iterator[Stop]:
    """Within the block, SIGTERM and SIGINT request a stop after the current step.

    A second signal ends the process immediately if one of the two is SIGINT. A repeated SIGTERM is the same request
    that arrived by another route (a scheduler sends it to all processes, and torchrun to its ranks), and must not
    interrupt a save.
    """
    stop = Stop(minutes)

    def handle(number, _frame):
        previous, received = REASONS[stop.reason], signal.Signals(number).name
        if previous.startswith("SIG") and "SIGINT" in (previous, received):
            os._exit(128 + number)
        stop.ask(received)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
