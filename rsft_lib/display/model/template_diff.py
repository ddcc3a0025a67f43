"""What a patch changes in rendered chats: reasons, and a unified diff."""

from dataclasses import dataclass

from rsft_lib.common.visible import visible
from rsft_lib.display.html import BLOCK, Table, escaped, tint
from rsft_lib.display.plot_style import BLUE, ORANGE

TITLE = "font-weight:bold"
STYLE = {"+": tint(BLUE), "-": tint(ORANGE)}  # of a line, by its first character


@dataclass(frozen=True)
class Difference:
    """A unified diff, folded in notebooks."""

    text: str

    def __repr__(self) -> str:
        return visible(self.text)

    def _repr_html_(self) -> str:
        lines = [line for line in self.text.splitlines() if not line.startswith("+++")]
        count = {sign: sum(line.startswith(sign) and line[:3] != "---" for line in lines) for sign in STYLE}
        styles = [TITLE if line[:3] == "---" else STYLE.get(line[:1], "") for line in lines]
        pairs = zip(styles, lines, strict=True)
        body = "".join(f"<div style='{style}'>{escaped(line) or ' '}</div>" for style, line in pairs)
        return (
            f"<details><summary>diff: {count['-']} lines removed, {count['+']} added</summary>"
            f"<pre style='{BLOCK}'>{body}</pre></details>"
        )


def changes_table(patched: dict) -> Table:
    """What changes and why, from the manifest of `patch_tokenizer`: sample chats, and tokens."""
    return Table("what changes", ("sample chat or token", "why"), list(patched["changes"].items()))
