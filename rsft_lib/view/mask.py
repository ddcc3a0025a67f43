"""What is trained and what is not, token by token, as HTML that survives papermill, GitHub and a missing colour."""

import html
from dataclasses import dataclass
from itertools import groupby

TRAINED = "background:#0b4f8a;color:#ffffff"  # contrast 8.4 : 1
UNTRAINED = "background:#ececec;color:#404040"  # contrast 8.8 : 1
EDGE = 4  # tokens shown on each side of where training begins or ends


@dataclass(frozen=True)
class MaskView:
    """A sample as text in which trained runs are marked: `[[...]]`, or bold on blue where HTML is shown."""

    runs: list[tuple[int, str]]
    edges: list[tuple[int, int, str, int]]
    tokens: int
    trained: int

    @property
    def header(self) -> str:
        share = self.trained / self.tokens
        return f"{self.tokens:,} tokens, {self.trained:,} trained ({share:.0%}); [[ ]] marks what is trained"

    def __repr__(self) -> str:
        marked = (f"[[{text}]]" if trained else text for trained, text in self.runs)
        return f"{self.header}\n\n{''.join(marked)}"

    def _repr_html_(self) -> str:
        body = "".join(_html(trained, text) for trained, text in self.runs)
        rows = "".join(
            f"<tr><td>{position}</td><td>{token}</td><td><code>{html.escape(repr(text))}</code></td>"
            f"<td>{'<b>trained</b>' if trained else '-'}</td></tr>"
            for position, token, text, trained in self.edges
        )
        head = "<tr><th>position</th><th>id</th><th>text</th><th></th></tr>"
        return (
            f"<p>{html.escape(self.header)}</p><div style='white-space:pre-wrap;font-family:monospace'>{body}</div>"
            f"<details><summary>tokens where training begins or ends</summary><table>{head}{rows}</table></details>"
        )


def show_mask(ids: list[int], loss_mask: list[int], tokenizer) -> MaskView:
    """The text of a sample with the trained tokens marked; the mask at a token says whether it is predicted.

    Whole runs are decoded at once, so characters of several tokens stay whole.

    Raises:
        ValueError: nothing or everything is trained, which is never meant.
    """
    ids, loss_mask = [int(i) for i in ids], [int(m) for m in loss_mask]
    trained = sum(loss_mask)
    if trained in (0, len(ids)):
        raise ValueError(f"{trained} of {len(ids)} tokens are trained: the mask is wrong; check the chat template")
    runs, start = [], 0
    for value, group in groupby(loss_mask):
        length = len(list(group))
        runs.append((value, tokenizer.decode(ids[start : start + length])))
        start += length
    return MaskView(runs, _edges(ids, loss_mask, tokenizer), len(ids), trained)


def _edges(ids: list[int], loss_mask: list[int], tokenizer) -> list[tuple[int, int, str, int]]:
    """(position, id, text, trained) of the tokens around every change of the mask."""
    changes = [i for i in range(1, len(ids)) if loss_mask[i] != loss_mask[i - 1]]
    near = sorted({j for i in [*changes, len(ids)] for j in range(max(0, i - EDGE), min(len(ids), i + EDGE))})
    return [(j, ids[j], tokenizer.decode([ids[j]]), loss_mask[j]) for j in near]


def _html(trained: int, text: str) -> str:
    text = html.escape(text).replace("\n", "↵\n")
    if trained:
        return f"<b style='{TRAINED}'>{text}</b>"
    return f"<span style='{UNTRAINED}'>{text}</span>"
