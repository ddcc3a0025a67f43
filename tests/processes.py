"""Processes that tests look for, and wait for."""

import time
from pathlib import Path

import psutil


def survivors(folder: Path) -> list[psutil.Process]:
    """Processes that still live and were given a path in `folder`, which is unique to a test: torchrun and ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until(condition, seconds: float, what: str, log: Path | None = None) -> None:
    """Wait for a condition; where it does not come, fail with what was waited for and the end of a log."""
    deadline = time.monotonic() + seconds
    while not condition():
        said = f"\n{log.read_text()[-5000:]}" if log and log.exists() else ""
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s{said}"
        time.sleep(0.1)
