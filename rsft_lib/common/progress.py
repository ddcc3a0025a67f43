"""Progress bars. Short tasks show none, so that saved notebooks contain no bars."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers.utils import logging

DELAY = 3  # seconds before anything is shown


def progress(what: str, unit: str, total: int | None = None) -> tqdm:
    """A bar that is cleared at the end. Without a terminal it refreshes rarely, since a headless run keeps them all.

    In a notebook it writes to stdout: on stderr it would leave an empty red box.
    """
    file, interval = (sys.stderr, 1) if sys.stderr.isatty() else (sys.stdout, 10)
    return tqdm(
        desc=what, total=total, file=file, unit=unit, unit_scale=True, mininterval=interval, delay=DELAY, leave=False
    )


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
