"""Reasons to stop before the end: a signal, a time limit, an alarm. All ranks must stop after the same step."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

REASONS = ("", "alarm", "time limit", "SIGINT", "SIGTERM")  # the larger wins when ranks differ


class Stop:
    """What this rank has heard so far; `reason` is a place in REASONS."""

    def __init__(self, minutes: float):
        self.reason, self.began, self.limit = 0, time.monotonic(), minutes * 60
        self.spare = 0.0

    def ask(self, name: str) -> None:
        self.reason = max(self.reason, REASONS.index(name))

    def look_at_the_clock(self, seconds: float) -> None:
        """Stop at the time limit when one more step like the last, of `seconds`, and a save would go past it."""
        self.spare = max(self.spare, seconds)
        if self.limit and time.monotonic() - self.began + self.spare > self.limit:
            self.ask("time limit")


@contextmanager
def stopping(minutes: float) -> Iterator[Stop]:
    """Within the block SIGTERM and SIGINT are remembered for the end of the step.

    A second SIGINT ends the process at once. A second SIGTERM is the same request that came on another way (a scheduler
    sends it to all processes, and torchrun to its ranks), and must not cost what is being saved.
    """
    stop = Stop(minutes)

    def handle(number, _frame):
        heard, now = REASONS[stop.reason], signal.Signals(number).name
        if heard.startswith("SIG") and "SIGINT" in (heard, now):
            os._exit(128 + number)
        stop.ask(now)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
