"""Named checks and the table that shows their results."""

import html
from collections.abc import Callable
from dataclasses import dataclass

from rsft_lib.common.visible import visible

DETAIL_LIMIT = 1000  # characters of an error that are shown; a template can write any number

MARKS = {True: "ok", False: "FAIL", None: "-"}
STYLES = {
    True: "background:#0b4f8a;color:#ffffff", False: "background:#8a1c0b;color:#ffffff",
    None: "background:#ececec;color:#404040",
}  # fmt: skip


class Skip(Exception):
    """Raised by a check that does not apply; the message is the reason."""


@dataclass(frozen=True)
class Check:
    """One row of the table; `passed` is None if the check was not run."""

    name: str
    passed: bool | None
    detail: str


class Checks(list[Check]):
    """A list of checks, displayed as a table."""

    @property
    def failed(self) -> list[Check]:
        return [check for check in self if check.passed is False]

    def require(self, what: str) -> None:
        """Raise a ValueError that begins with `what` and lists every failed check."""
        if self.failed:
            failures = "\n".join(f"  {check.name}: {check.detail}" for check in self.failed)
            raise ValueError(f"{what} breaks the contract between training and serving (notebook 01):\n{failures}")

    def run(self, name: str, check: Callable[..., str], *arguments) -> bool:
        """Run a check and append its result: `check` returns the detail of a success, or raises ValueError or Skip."""
        try:
            self.append(Check(name, True, visible(check(*arguments))))
        except Skip as reason:
            self.append(Check(name, None, visible(str(reason))))
        except ValueError as error:
            self.append(Check(name, False, visible(str(error)[:DETAIL_LIMIT])))
        return bool(self[-1].passed)

    def __repr__(self) -> str:
        width = max((len(check.name) for check in self), default=0)
        return "\n".join(f"{MARKS[check.passed]:<5} {check.name:<{width}}  {check.detail}" for check in self)

    def _repr_html_(self) -> str:
        head = "".join(f"<th style='text-align:left'>{name}</th>" for name in ("check", "what was found"))
        rows = "".join(
            f"<tr><td><b style='{STYLES[check.passed]};padding:0 .5em'>{MARKS[check.passed]}</b></td>"
            f"<td style='text-align:left'>{html.escape(check.name)}</td>"
            f"<td style='text-align:left'>{html.escape(check.detail)}</td></tr>"
            for check in self
        )
        return f"<table><tr><th></th>{head}</tr>{rows}</table>"
