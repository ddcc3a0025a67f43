"""`train.log`: the output of all starts of a run, each under a marker line."""

import os
import re
import time
from pathlib import Path

MARK = "=== run"
REPORT = re.compile(r"^E\d{4} .*elastic/multiprocessing/api\.py.*\Z", re.MULTILINE | re.DOTALL)
_LINE = re.compile(rf"^{MARK} .*$\n?", re.MULTILINE)


def mark(log: Path, what: str) -> None:
    """Append a marker line that starts a new section of the log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{chr(10) if file.tell() else ''}{MARK} {what} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")


def read_end(log: Path, size: int) -> str:
    """The output of the last start within the last `size` bytes of a log; empty if there is no log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return _LINE.split(file.read(size).decode("utf-8", errors="replace"))[-1]


def without_report(text: str) -> str:
    """The output of the ranks, without torchrun's report that one failed, which it writes of stopped ones, too."""
    return REPORT.sub("", text)
