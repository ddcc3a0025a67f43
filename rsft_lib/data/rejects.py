"""Rows that cannot be used: kept beside the result with the reason, and too many of them end the work."""

import json
from pathlib import Path
from typing import NamedTuple

from rsft_lib.common.temporary import beside
from rsft_lib.common.visible import visible
from rsft_lib.data.records import Row, as_text

HOPELESS = 1000  # rejected rows after which work that mostly fails is not carried on
LONGEST = 1000  # characters of a reason; an error may quote all of a row


class Reject(NamedTuple):
    """A row that was refused: its file and its number there, why, and what stood there."""

    file: str
    line: int
    reason: str
    record: str


def reject(file: str, row: Row, error: Exception) -> Reject:
    """A row with what it raised, whatever that was: no row ends the work."""
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return Reject(file, row.number, reason[:LONGEST], as_text(row.content))


class Rejects:
    """Writes `<name>.rejected.jsonl` beside the folder `final`; removed again when nothing was rejected.

    Use as a context; `add` rows in order and `settle` at the end, which raises when the limit is passed.
    """

    def __init__(self, final: Path, limit: float):
        """`limit` is the largest share of rows, from 0 to 1, that may be rejected."""
        if not 0 <= limit <= 1:
            raise ValueError(f"reject_limit is {limit}; it is a share of the rows, from 0 to 1")
        self.path = final.with_name(f"{final.name}.rejected.jsonl")
        self.limit, self.count, self.first = limit, 0, None

    def __enter__(self) -> "Rejects":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.writing = beside(self.path)
        self.temporary = self.writing.__enter__()
        # Half of a surrogate pair cannot be written, but its escape in JSON can.
        self.file = self.temporary.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, rows: list[Reject], seen: int) -> None:
        """Keep `rows`; `seen` is how many rows were read up to here.

        Raises:
            ValueError: most rows are rejected, so going on is of no use.
        """
        for row in rows:
            self.first = self.first or row
            self.file.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
        self.count += len(rows)
        if self.count > max(HOPELESS, seen / 2, self.limit * seen):
            self.settle(seen)

    def settle(self, seen: int) -> None:
        """Give the file its name, and end the work if it holds too many rows.

        Raises:
            ValueError: over `limit` of the rows are rejected; the message has the first reason.
        """
        self.file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)
            return
        self.temporary.replace(self.path)
        if self.count > self.limit * seen:
            raise ValueError(
                f"{visible(f'{self.first.file}:{self.first.line}: {self.first.reason}')}\n"
                f"{self.count} of {seen} records are rejected, more than the limit of {self.limit:.2%}; each is in "
                f"{visible(str(self.path))} with its reason. Mend them, or raise reject_limit to go on without them."
            )

    def __exit__(self, *error) -> None:
        self.file.close()
        self.writing.__exit__(*error)
