"""The edits that a patch makes to a chat template: reasons, and a unified diff."""

from dataclasses import dataclass

from rsft_lib.common.visible import visible
from rsft_lib.display.html import BLOCK, INK, Table, escaped

# Background and text colour of a line by its first character.
STYLE = {"+": "background:#e3eff9;color:#08304f", "-": "background:#fdeee2;color:#552a00"}


@dataclass(frozen=True)
class Difference:
    """A unified diff, folded in notebooks."""

    text: str

    def __repr__(self) -> str:
        return visible(self.text)

    def _repr_html_(self) -> str:
        lines = [line for line in self.text.splitlines() if not line.startswith(("---", "+++"))]
        count = {sign: sum(line.startswith(sign) for line in lines) for sign in STYLE}
        body = "".join(f"<div style='{STYLE.get(line[:1], '')}'>{escaped(line) or ' '}</div>" for line in lines)
        return (
            f"<details><summary>diff: {count['-']} lines removed, {count['+']} added</summary>"
            f"<pre style='{BLOCK};background:#ffffff;color:{INK}'>{body}</pre></details>"
        )


def edits_table(patched: dict) -> Table:
    """The reason for each edit of the template, from the manifest of `patch_tokenizer`."""
    return Table("edits of the chat template", ("where", "why"), list(patched["edits"].items()))
