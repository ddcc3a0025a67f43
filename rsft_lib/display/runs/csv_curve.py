"""A published loss curve, read from a CSV file with arbitrary column names."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rsft_lib.common.paths import require_path
from rsft_lib.display.runs.runs import BY

LINES = {"loss": "train", "held_out": "held-out"}


@dataclass(frozen=True)
class Published:
    """`columns` has float64 [rows] for each key of BY and LINES in the file; NaN in empty cells."""

    name: str
    columns: dict[str, np.ndarray]

    def line(self, what: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of `loss` or `held_out`; empty if the file lacks that column or the x axis."""
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
    """Read a curve from a CSV file with a header.

    Args:
        columns: our name -> theirs, e.g. {'step': 'total_steps', 'loss': 'train_loss', 'held_out': 'val_loss'}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a value is not a number, or `columns` lacks a loss or an x axis.
    """
    path = require_path(path, "published curve")
    unknown = columns.keys() - {*BY, *LINES}
    if unknown or not columns.keys() & BY.keys() or not columns.keys() & LINES.keys():
        raise ValueError(
            f"columns of {path} are {columns}; expected at least one of {', '.join(BY)} and one of "
            f"{', '.join(LINES)}, as in `step -> total_steps, loss -> train_loss`"
        )
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [theirs for theirs in columns.values() if theirs not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has columns {rows.fieldnames}, but not {', '.join(missing)}")
        values = [[_number(row[theirs], path, rows.line_num) for theirs in columns.values()] for row in rows]
    if not values:
        raise ValueError(f"{path} has no rows")
    return Published(path.stem, dict(zip(columns, np.array(values).T, strict=True)))


def _number(text: str | None, path: Path, line: int) -> float:
    if text is None or not text.strip():
        return np.nan  # not measured at this step
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}:{line}: found {text!r}, expected a number") from None
