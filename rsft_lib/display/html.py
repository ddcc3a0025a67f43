"""Dataset text as inert HTML (no markup, control or bidi characters take effect), and tables and bars.

Styles are inline and of the kind that JupyterLab keeps in untrusted notebooks, which excludes variables of its theme.
So text and ground are the theme's, light or dark, and colours are laid over them with little opacity. GitHub drops all
styles, so everything that a colour encodes is also written out.
"""

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rsft_lib.common.visible import HIDDEN, visible

FAINT = "opacity:0.75"  # secondary text
LINE = "1px solid rgba(128,128,128,0.5)"
PANEL = f"border:{LINE};border-radius:6px;padding:10px 14px;font-size:13px;line-height:1.4;overflow-x:auto"
BLOCK = (
    "margin:0;padding:3px 8px;white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;unicode-bidi:plaintext;"
    "font-size:12px;line-height:1.45;font-family:monospace;background:transparent"
)
TABLE = "border-collapse:collapse;margin:2px 0"
CELL = "text-align:left;vertical-align:top;padding:2px 14px 2px 0;border:0"
RIGHT = ";text-align:right"
ONE_LINE, SHORT = ";white-space:nowrap", 24  # cells of up to SHORT characters do not wrap

GAP = "⋮"  # cell of a row that stands for omitted rows


def tint(color: str, share: float = 0.15) -> str:
    """A style: `color`, as #rrggbb, over the ground of the theme; a low `share` keeps the theme's text legible."""
    red, green, blue = bytes.fromhex(color[1:])
    return f"background:rgba({red},{green},{blue},{share})"


def escaped(text: str) -> str:
    """`text` as HTML for <pre>; a visible sign precedes each line break and tab."""
    return html.escape(visible(text), quote=False).replace("\n", "↵\n").replace("\t", "⇥\t")


def inert(text: str) -> str:
    """`text` as HTML outside of <pre>, where notebooks would typeset text between dollar signs as mathematics."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(visible(text)))


def one_line(text: str) -> str:
    """`text` with line breaks and tabs replaced by signs."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def caption(text: str) -> str:
    """`text` as a plot label, where matplotlib would typeset text between dollar signs as mathematics."""
    plain = HIDDEN.sub(lambda match: f"⟨{ord(match[0]):04X}⟩", text)  # fonts have these glyphs
    return one_line(plain).replace("$", r"\$")


@dataclass(frozen=True)
class Table:
    """A small table: text in a terminal, HTML in the colours of the theme in a notebook. Numbers are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]
    note: str = ""

    def __repr__(self) -> str:
        cells = [[_cell(value) for value in row] for row in (self.columns, *self.rows)]
        widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
        right = self._right()
        lines = [
            "   ".join(_pad(c, w, r) for c, w, r in zip(row, widths, right, strict=True)).rstrip() for row in cells
        ]
        return visible("\n".join([self.title, *(lines if self.rows else []), *([self.note] if self.note else [])]))

    def _repr_html_(self) -> str:
        right = self._right()
        head = self._row_html("th", self.columns, right, f";border-bottom:{LINE}")
        body = "".join(self._row_html("td", row, right) for row in self.rows)
        table = f"<table style='{TABLE}'><thead>{head}</thead><tbody>{body}</tbody></table>"
        note = f"<div style='margin-top:4px'>{inert(self.note)}</div>" if self.note else ""
        return (
            f"<div style='padding:4px 0;font-size:13px'><b>{inert(self.title)}</b>"
            f"{table if self.rows else ''}{note}</div>"
        )

    def _row_html(self, tag: str, row: Sequence, right: list[bool], style: str = "") -> str:
        cells = (
            f"<{tag} style='{CELL}{RIGHT if is_right else ''}{ONE_LINE if len(text) <= SHORT else ''}{style}'>"
            f"{inert(text)}</{tag}>"
            for text, is_right in zip(map(_cell, row), right, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    def _right(self) -> list[bool]:
        return [all(_cell(value)[:1].isdigit() for value in column if value != GAP) for column in self._by_column()]

    def _by_column(self) -> list[tuple]:
        return list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.columns)


def bar(parts: Sequence[tuple[float, str, str]]) -> str:
    """A bar of parts (share, label, style), to scale but a few pixels wide at least."""
    cells = "".join(
        f"<div title='{html.escape(label)}' style='flex:{share:.4f} 1 auto;min-width:3px;height:12px;{style}'></div>"
        for share, label, style in parts
    )
    return f"<div style='display:flex;margin:6px 0'>{cells}</div>"


def warning(text: str) -> str:
    style = f"{tint('#e69f00', 0.2)};border-left:4px solid #e69f00;padding:2px 8px;margin:4px 0"
    return f"<div style='{style}'><b>!</b> {inert(text)}</div>"


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space
