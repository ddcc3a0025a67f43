"""Unusable rows, caught in `worker` and `hybrid`: saved beside the output with the reason; too many are an error."""

import json
from pathlib import Path
from typing import NamedTuple

from rsft_lib.common.temporary import beside
from rsft_lib.common.visible import visible
from rsft_lib.data.records import Row, as_text

EARLY_STOP = 1000  # rejected rows after which processing stops if most rows are rejected
REASON_LIMIT = 1000  # characters of a reason; an error may quote an entire row


class Reject(NamedTuple):
    """A rejected row: its file, its number there, the reason, and its content."""

    file: str
    line: int
    reason: str
    record: str


def reject(file: str, row: Row, error: Exception) -> Reject:
    """A row with the exception it raised, of any type, as the reason."""
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return Reject(file, row.number, reason[:REASON_LIMIT], as_text(row.content))


class Rejects:
    """Writes `<name>.rejected.jsonl` beside the folder `final`; without rejected rows the file is removed.

    Use as a context manager: `add` rows in order, then `settle`, which raises if the limit is exceeded.
    """

    def __init__(self, final: Path, limit: float):
        """`limit`: maximum fraction of rejected rows, from 0 to 1."""
        if not 0 <= limit <= 1:
            raise ValueError(f"reject_limit is {limit}; it must be a fraction of the rows, from 0 to 1")
        self.path = final.with_name(f"{final.name}.rejected.jsonl")
        self.limit, self.count = limit, 0
        self.first: Reject | None = None

    def __enter__(self) -> "Rejects":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writing = beside(self.path)
        self.temporary = self.writing.__enter__()
        # Lone surrogates cannot be encoded; backslashreplace writes their JSON escapes.
        self.file = self.temporary.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, rows: list[Reject], seen: int) -> None:
        """Add `rows`; `seen` is the number of rows read so far.

        Raises:
            ValueError: so many rows are rejected that continuing is useless.
        """
        for row in rows:
            self.first = self.first or row
            self.file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
        self.count += len(rows)
        if self.count > max(EARLY_STOP, seen / 2, self.limit * seen):
            self.settle(seen)

    def settle(self, seen: int) -> None:
        """Rename the file to its final name, and check the limit.

        Raises:
            ValueError: more than `limit` of the rows are rejected; the message has the first reason.
        """
        self.file.close()
        if self.first is None:
            self.path.unlink(missing_ok=True)
            return
        self.temporary.replace(self.path)
        if self.count > self.limit * seen:
            raise ValueError(
                f"{visible(f'{self.first.file}:{self.first.line}: {self.first.reason}')}\n"
                f"{self.count} of {seen} records are rejected, more than the limit of {self.limit:.2%}; "
                f"{visible(str(self.path))} lists them with their reasons. Fix them, or raise reject_limit to continue "
                "without them."
            )

    def __exit__(self, *error) -> None:
        self.file.close()
        self.writing.__exit__(*error)
