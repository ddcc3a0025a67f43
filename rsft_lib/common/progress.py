"""How far a task is. Short tasks say nothing, so that what is kept of a notebook holds no bars."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers.utils import logging

DELAY = 3  # seconds before anything is shown


def progress(what: str, unit: str, total: int | None = None) -> tqdm:
    """A bar that takes itself away at the end. Headless, every refresh stays in the notebook, so these are few.

    In a notebook it is no error output, of which an empty red box would stay.
    """
    file, quiet = (sys.stderr, 1) if sys.stderr.isatty() else (sys.stdout, 10)
    return tqdm(
        desc=what, total=total, file=file, unit=unit, unit_scale=True, mininterval=quiet, delay=DELAY, leave=False
    )


@contextmanager
def without_bars() -> Iterator[None]:
    """Have transformers load and save without bars, which notebooks would keep as widgets that stand at 0 %."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
