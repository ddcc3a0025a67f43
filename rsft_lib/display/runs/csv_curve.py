"""Somebody else's loss curve, from a CSV file with columns of any name."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsft_lib.common.paths import existing
from rsft_lib.display.runs.runs import BY

LINES = {"loss": "train", "held_out": "held-out"}


@dataclass(frozen=True)
class Published:
    """`columns` has a float64 [rows] for each of BY and LINES that the file has; NaN where a row has no number."""

    name: str
    columns: dict[str, np.ndarray]

    def line(self, what: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of `loss` or `held_out`; empty where the file has none, or nothing to draw it by."""
        if what not in self.columns:
            return np.zeros(0), np.zeros(0)
        x = self._x(by)
        known = np.isfinite(x) & np.isfinite(self.columns[what])
        return x[known], self.columns[what][known]

    def _x(self, by: str) -> np.ndarray:
        if by == "share" and by not in self.columns:
            order = next((self.columns[name] for name in BY if name in self.columns), np.zeros(0))
            return 100 * order / np.nanmax(order) if len(order) else order
        return self.columns.get(by, np.full(len(next(iter(self.columns.values()))), np.nan))


def read_published(path: str | Path, columns: dict[str, str]) -> Published:
    """A curve from a CSV file whose first line names its columns.

    Args:
        columns: what the file calls them, e.g. {'step': 'total_steps', 'loss': 'train_loss', 'held_out': 'val_loss'}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it lacks a column, a value is no number, or `columns` names no line or nothing to draw it by.
    """
    path = existing(path, "published curve")
    unknown = columns.keys() - {*BY, *LINES}
    if unknown or not columns.keys() & BY.keys() or not columns.keys() & LINES.keys():
        raise ValueError(
            f"the columns of {path} are given as {columns}; expected at least one of {', '.join(BY)} and one of "
            f"{', '.join(LINES)}, as in `step -> total_steps, loss -> train_loss`"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [theirs for theirs in columns.values() if theirs not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has the columns {rows.fieldnames}, but not {', '.join(missing)}")
        values = [[_number(row[theirs], path, rows.line_num) for theirs in columns.values()] for row in rows]
    if not values:
        raise ValueError(f"{path} has no line under its header")
    return Published(path.stem, dict(zip(columns, np.array(values).T, strict=True)))


def _number(text: str | None, path: Path, line: int) -> float:
    if not (text or "").strip():
        return np.nan  # not measured after this step
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}:{line}: found {text!r}, expected a number") from None
