"""Whether the text of a chat template depends on when it is rendered.

Of the clock a template has `strftime_now`, which transformers gives it, and of chance Jinja's filter `random`. Whatever
date a template waits for, it has to look at what these return: a text that is the same when they return something that
cannot be looked at depends on neither. Chance from elsewhere (`lipsum`) is found by rendering more than once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from os.path import commonprefix
from types import SimpleNamespace

import jinja2.filters
from transformers.utils import chat_template_utils

# To show what changes: every month, most weekdays, both halves of a day, years near and far.
YEARS = [1998, 1999, 2024, 2025, 2026, 2027, 2028, 2029, 1970, 1900, 2100, 9999]
MOMENTS = [
    datetime(year, i + 1, i * i % 31 + 1, 13 * i % 24, 11 * i % 60, 59 - 5 * i, 80_000 * i)
    for i, year in enumerate(YEARS)
]


class _LookedAt(BaseException):
    """What the clock or chance returned was used. No `except Exception` on the way hides it."""


def _look(*_) -> None:
    raise _LookedAt


# Anything else ends in an error of Jinja or Python, which is another text too; `|int` and `|float` would hide theirs.
LOOKS = (
    "__str__ __repr__ __format__ __bool__ __eq__ __hash__ __len__ __iter__ __getitem__ __getattr__ __int__ __float__"
)
Sealed = type("Sealed", (), dict.fromkeys(LOOKS.split(), _look))  # may be kept in variables, and no more


def difference(render: Callable[[], str]) -> str:
    """How the text that `render` returns depends on time or chance, and what to do, as a sentence; '' if on neither."""
    first = _text_at(MOMENTS[0], render)
    if _text_at(MOMENTS[-1], render) == first and _text_sealed(render) == first:
        return ""
    found = "the template takes something from strftime_now or from chance"  # on a day or by odds not among these
    for moment in MOMENTS[1:]:
        text = _text_at(moment, render)
        if text != first:
            begin = max(0, len(commonprefix([first, text])) - 30)
            shown = [
                f"{whole[begin : begin + 60]!r} on {when:%A %d %B %Y at %H:%M}"
                for whole, when in ((first, MOMENTS[0]), (text, moment))
            ]
            found = ", ".join(shown)
            break
    return (
        f"the text depends on when it is rendered: {found}; what is served would not be what was "
        "trained. Write a fixed date into the template, or none, and nothing random (`template` in notebook 01)"
    )


def _text_at(moment: datetime, render: Callable[[], str]) -> str:
    """What is rendered at a moment; where the template refuses the conversation, in what words."""
    with _in_place(chat_template_utils, "datetime", SimpleNamespace(now=lambda: moment)):
        return _text_or_error(render)


def _text_sealed(render: Callable[[], str]) -> str | None:
    """What is rendered when nothing can be read from the clock or chance; None if the template looks at either."""
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda format: Sealed()))
    chance = SimpleNamespace(choice=lambda items: Sealed())
    with _in_place(chat_template_utils, "datetime", clock), _in_place(jinja2.filters, "random", chance):
        try:
            return _text_or_error(render)
        except _LookedAt:
            return None


def _text_or_error(render: Callable[[], str]) -> str:
    try:
        return render()
    except (MemoryError, TimeoutError):  # of rsft_lib.common.sandbox
        raise
    except Exception as error:  # a template can raise anything
        return f"{type(error).__name__}: {error}"


@contextmanager
def _in_place(module, name: str, stand_in) -> Iterator[None]:
    """Let a module that renders templates find `stand_in` under a name that it imported."""
    before = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, before)
