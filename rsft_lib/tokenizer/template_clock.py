"""Detect chat templates whose text depends on the time or on randomness.

A template reads the clock through `strftime_now` (from transformers) and random values through Jinja's filter `random`.
To depend on either, it must inspect the returned value: if the text is unchanged when they return objects that raise on
inspection, it is deterministic. Other randomness (`lipsum`) is found by rendering more than once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from os.path import commonprefix
from types import SimpleNamespace

import jinja2.filters
from transformers.utils import chat_template_utils

# Rendered to show what changes: every month, most weekdays, AM and PM, near and distant years.
YEARS = [1998, 1999, 2024, 2025, 2026, 2027, 2028, 2029, 1970, 1900, 2100, 9999]
MOMENTS = [
    datetime(year, i + 1, i * i % 31 + 1, 13 * i % 24, 11 * i % 60, 59 - 5 * i, 80_000 * i)
    for i, year in enumerate(YEARS)
]


class _Inspected(BaseException):
    """A value of the clock or of `random` was inspected. A BaseException, so that no `except Exception` hides it."""


def _raise_inspected(*_) -> None:
    raise _Inspected


# Any other use raises an error of Jinja or Python, which changes the text too; `|int` and `|float` would swallow it.
INSPECTIONS = (
    "__str__ __repr__ __format__ __bool__ __eq__ __hash__ __len__ __iter__ __getitem__ __getattr__ __int__ __float__"
)
Sealed = type("Sealed", (), dict.fromkeys(INSPECTIONS.split(), _raise_inspected))  # can only be stored in variables


def difference(render: Callable[[], str]) -> str:
    """An error message if the text that `render` returns depends on time or randomness; '' if it does not."""
    first = _text_at(MOMENTS[0], render)
    if _text_at(MOMENTS[-1], render) == first and _text_sealed(render) == first:
        return ""
    evidence = "the template uses strftime_now or a random value"  # that is, if no moment below shows a difference
    for moment in MOMENTS[1:]:
        text = _text_at(moment, render)
        if text != first:
            begin = max(0, len(commonprefix([first, text])) - 30)
            excerpts = [
                f"{whole[begin : begin + 60]!r} on {when:%A %d %B %Y at %H:%M}"
                for whole, when in ((first, MOMENTS[0]), (text, moment))
            ]
            evidence = ", ".join(excerpts)
            break
    return (
        f"the text depends on when it is rendered: {evidence}; serving would differ from training. Use a fixed date or "
        "none in the template, and nothing random (`template` in notebook 01)"
    )


@contextmanager
def clock_at(moment: datetime) -> Iterator[None]:
    """Let templates read `moment` from the clock."""
    with _replaced(chat_template_utils, "datetime", SimpleNamespace(now=lambda: moment)):
        yield


def _text_at(moment: datetime, render: Callable[[], str]) -> str:
    """The text rendered at a given time, or the error if the template rejects the conversation."""
    with clock_at(moment):
        return _text_or_error(render)


def _text_sealed(render: Callable[[], str]) -> str | None:
    """The text rendered with clock and random values sealed; None if the template inspects one."""
    clock = SimpleNamespace(now=lambda: SimpleNamespace(strftime=lambda format: Sealed()))
    random = SimpleNamespace(choice=lambda items: Sealed())
    with _replaced(chat_template_utils, "datetime", clock), _replaced(jinja2.filters, "random", random):
        try:
            return _text_or_error(render)
        except _Inspected:
            return None


def _text_or_error(render: Callable[[], str]) -> str:
    try:
        return render()
    except (MemoryError, TimeoutError):  # of rsft_lib.common.sandbox
        raise
    except Exception as error:  # a template can raise anything
        return f"{type(error).__name__}: {error}"


@contextmanager
def _replaced(module, name: str, substitute) -> Iterator[None]:
    """Temporarily replace an attribute of a module."""
    before = getattr(module, name)
    setattr(module, name, substitute)
    try:
        yield
    finally:
        setattr(module, name, before)
