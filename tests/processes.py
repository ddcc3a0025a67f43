"""Find processes, and wait for conditions."""

import time
from pathlib import Path

import psutil


def survivors(folder: Path) -> list[psutil.Process]:
    """Live processes with `folder`, which is unique to a test, in their arguments: torchrun and ranks."""
    alive = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive


def wait_until(condition, seconds: float, what: str, log: Path | None = None) -> None:
    """Wait for a condition; after `seconds`, fail with `what` and the end of a log."""
    deadline = time.monotonic() + seconds
    while not condition():
        end = f"\n{log.read_text()[-5000:]}" if log and log.exists() else ""
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s{end}"
        time.sleep(0.1)
