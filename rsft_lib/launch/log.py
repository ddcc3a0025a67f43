"""`train.log`: the output of every start of a run, each under a line of its own; a cause is looked for in the last."""

import os
import re
import time
from pathlib import Path

MARK = "=== run"
_LINE = re.compile(rf"^{MARK} .*$\n?", re.MULTILINE)


def mark(log: Path, what: str) -> None:
    """Begin a new part of a log: everything before this moment belongs to an earlier start."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{chr(10) if file.tell() else ''}{MARK} {what} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")


def read_end(log: Path, size: int) -> str:
    """What the last start said, of the last `size` bytes of a log; empty where there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        return _LINE.split(file.read(size).decode("utf-8", errors="replace"))[-1]
