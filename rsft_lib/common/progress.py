"""Progress bars that end at 100 %. Short tasks show none, so that most saved notebooks contain no bars."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers.utils import logging

DELAY = 3  # seconds before anything is shown


@contextmanager
def progress(what: str, unit: str, total: int | None = None) -> Iterator[tqdm]:
    """A bar, complete if the block ends without an error.

    In a notebook it is one output, updated in place and kept; in a terminal it is cleared at the end.
    """
    cell, terminal = _in_notebook(), sys.stderr.isatty()
    with tqdm(
        desc=what, total=total, unit=unit, unit_scale=True, delay=DELAY,
        leave=cell, ascii=False, ncols=80 if cell else None,
        file=_Cell() if cell else sys.stderr if terminal else sys.stdout,  # type: ignore[arg-type]
        mininterval=1 if cell or terminal else 10,  # a log keeps all states
    ) as bar:  # fmt: skip
        yield bar
        bar.n = bar.total or bar.n  # bytes between rows are not counted


@contextmanager
def without_bars() -> Iterator[None]:
    """Disable transformers' progress bars, which saved notebooks would keep as widgets stuck at 0 %."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class _Cell:
    """A file for tqdm whose last line is a cell's output; a stream would keep every state of the bar."""

    def __init__(self) -> None:
        self.handle = None

    def write(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text.strip()}
        if not text.strip():
            return
        if self.handle:
            self.handle.update(content, raw=True)
        else:
            self.handle = display(content, raw=True, display_id=True)

    def flush(self) -> None:
        """tqdm calls it."""


def _in_notebook() -> bool:
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None
