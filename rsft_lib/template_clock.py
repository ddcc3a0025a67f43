"""Whether the text of a chat template depends on when it is rendered.

Of the clock a template has `strftime_now`, which transformers gives it. Chance, in Jinja's own `random` and `lipsum`,
is found as well: the text is rendered many times.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from os.path import commonprefix
from types import SimpleNamespace

from transformers.utils import chat_template_utils

# Among them every day of a month, month, weekday and hour, and no digit or letter that a date always has.
MOMENTS = [datetime(1998 + i, i % 12 + 1, i + 1, i % 24, i + 29, 59 - i, 999_999 - 31_415 * i) for i in range(31)]


def difference(render: Callable[[], str]) -> str:
    """Two texts that `render` returns at different MOMENTS, and what to do, as a sentence; '' if all are the same."""
    first = _text_at(MOMENTS[0], render)
    for moment in MOMENTS[1:]:
        text = _text_at(moment, render)
        if text != first:
            begin = max(0, len(commonprefix([first, text])) - 30)
            shown = [
                f"{whole[begin : begin + 60]!r} on {when:%A %d %B %Y at %H:%M}"
                for whole, when in ((first, MOMENTS[0]), (text, moment))
            ]
            return (
                f"the text depends on when it is rendered: {', '.join(shown)}; what is served would not be what was "
                "trained. Write a fixed date into the template, or none, and nothing random (`template` in notebook 01)"
            )
    return ""


def _text_at(moment: datetime, render: Callable[[], str]) -> str:
    """What is rendered at a moment; where the template refuses the conversation, in what words."""
    try:
        with _clock_at(moment):
            return render()
    except (MemoryError, TimeoutError):  # of rsft_lib.sandbox
        raise
    except Exception as error:  # a template can raise anything
        return f"{type(error).__name__}: {error}"


@contextmanager
def _clock_at(moment: datetime) -> Iterator[None]:
    """Let `strftime_now` of templates tell this moment."""
    before = chat_template_utils.datetime
    chat_template_utils.datetime = SimpleNamespace(now=lambda: moment)
    try:
        yield
    finally:
        chat_template_utils.datetime = before
