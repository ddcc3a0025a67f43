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


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
