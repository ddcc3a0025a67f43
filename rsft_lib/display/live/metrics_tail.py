"""Incremental reader of a growing `metrics.jsonl`: each line is read once, however long the run."""

import os
from array import array
from collections import deque
from pathlib import Path

from rsft_lib.display.metric_styles import CHOICES, LOSSES, held_out_sets
from rsft_lib.training.metrics import FILE, parse

DRAWN = (*LOSSES, "eval_loss", *CHOICES)
ALARMS = 3  # most recent alarms kept


class Follower:
    """Metrics of a run: `last` has the newest value of each, `lines` all steps and values of those in DRAWN, and of the
    losses on held-out data."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / FILE
        self._begin()

    def _begin(self) -> None:
        self.last: dict = {}
        self.lines = {name: (array("d"), array("d")) for name in DRAWN}  # steps, values
        self.alarms: deque[str] = deque(maxlen=ALARMS)
        self.damaged: list[int] = []  # numbers of unreadable lines
        self.alarm_count, self._offset, self._file, self._number = 0, 0, 0, 0

    def read(self) -> bool:
        """Read the lines added since the last call and return whether there were any; an incomplete line is left."""
        try:
            with self.path.open("rb") as file:
                self._seek(file)
                text = file.read()
        except FileNotFoundError:
            return False
        complete = text[: text.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.split(b"\n")[:-1]:
            self._number += 1
            record, problem = parse(line)
            if record:
                self._add(record)
            if problem:
                self.damaged.append(self._number)
        return bool(complete)

    @property
    def problem(self) -> str:
        """A message about damaged lines; empty if there are none."""
        if not self.damaged:
            return ""
        first, *others = self.damaged
        more = f" and {len(others)} more" if others else ""
        return f"{FILE}: line {first}{more} damaged; the training is not affected"

    def _seek(self, file) -> None:
        """Seek to where reading ended, or to the start if the file was replaced, as a resumed run does."""
        stat = os.fstat(file.fileno())
        if stat.st_ino != self._file or stat.st_size < self._offset:
            self._begin()
            self._file = stat.st_ino
        file.seek(self._offset)

    def _add(self, record: dict) -> None:
        for name in held_out_sets(record).values():
            self.lines.setdefault(name, (array("d"), array("d")))
        self.last |= {name: value for name, value in record.items() if value is not None}
        for name, (steps, values) in self.lines.items():
            if record.get(name) is not None:
                steps.append(record["iteration"])
                values.append(record[name])
        for alarm in record.get("alarms", []):
            self.alarm_count += 1
            self.alarms.append(f"step {record['iteration']:,}: {alarm}")
