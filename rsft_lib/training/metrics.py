"""`metrics.jsonl`: one JSON object per line, written by one rank and read by notebooks."""

import json
import os
from pathlib import Path

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records; each is on disk before the next step begins."""

    def __init__(self, folder: Path, iteration: int):
        """Open the file to go on after `iteration`: later records, of a run that was lost, are removed."""
        path = folder / FILE
        kept = [record for record in read_metrics(folder) if record["iteration"] <= iteration]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, **record) -> None:
        self.file.write(_line(record))
        self.file.flush()
        os.fsync(self.file.fileno())


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run folder, in order; none when it has not begun, and no half-written last line."""
    path = Path(folder) / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"
