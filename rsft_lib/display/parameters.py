"""The parameters of a notebook with their origins; in a notebook, defaults are folded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rsft_lib.common.visible import visible
from rsft_lib.display.html import Table


@dataclass(frozen=True)
class ParameterList:
    """Name -> (value, origin); the origin of a default is empty."""

    values: Mapping[str, tuple[Any, str]]

    def __repr__(self) -> str:
        width = max(map(len, self.values))
        lines = (f"{name:<{width}}  {value!r}{_in_brackets(origin)}" for name, (value, origin) in self.values.items())
        return visible("\n".join(lines))

    def _repr_html_(self) -> str:
        rows = [(name, repr(value), origin) for name, (value, origin) in self.values.items()]
        changed, defaults = [row for row in rows if row[2]], [row[:2] for row in rows if not row[2]]
        table = Table("parameters", ("name", "value", "origin"), changed)._repr_html_() if changed else ""
        if not defaults:
            return table
        folded = Table("", ("name", "value"), defaults)._repr_html_()
        return f"{table}<details><summary>defaults: {len(defaults)} parameters</summary>{folded}</details>"


def _in_brackets(origin: str) -> str:
    return f"  ({origin})" if origin else ""
