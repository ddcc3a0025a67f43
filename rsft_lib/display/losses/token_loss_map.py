"""The loss of each token over the text of a sample, before and after a training: a heat map that needs no colour."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.common.visible import visible
from rsft_lib.data.span_kinds import MODE_NAMES
from rsft_lib.display.html import BLOCK, FAINT, PANEL, escaped, inert, one_line, warning
from rsft_lib.display.mask.sample import chip
from rsft_lib.display.mask.token_text import TokenText
from rsft_lib.evaluation.loss_comparison import REASONS, Comparison, Suspect

# Nats from which on a token is of the next level, its probability in per cent, and background, text and tags: what is
# hard is underlined, then bold, then tells its loss, so that it is seen without colour too. Contrast 7 : 1 at least.
LEVELS = (0.0, 0.1, 0.5, 1.5, 4.0)
COLORS = (("#ffffff", "#474747"), ("#fdeee2", "#474033"), ("#f9cfa6", "#3d2600"), ("#f0a060", "#2b1700"),
          ("#7a2e00", "#ffffff"))  # fmt: skip
TAGS = ("{}", "{}", "<u>{}</u>", "<b><u>{}</u></b>", "<b><u>{}</u></b>")
NAMED = 8  # of the hardest tokens, which tell their loss
SHOWN = 1200  # trained tokens that are shown at most
MERGED = 300  # more of them than this, and easy ones next to each other become one piece
CONTEXT = 240  # characters of the text before an answer that are shown
AROUND = 24  # tokens on either side of a hard one in `around`


class Warm(NamedTuple):
    """Tokens `start` to `end` (exclusive) shown as one; `before` and `after` are means of their losses."""

    start: int
    end: int
    before: float
    after: float


@dataclass(frozen=True)
class HeatView:
    """A sample: losses float32 [tokens], NaN where none is; its trained tokens `first` to `last` are shown."""

    title: str
    mode: str
    before: np.ndarray
    after: np.ndarray
    text: TokenText
    why: tuple[str, ...]
    first: int
    last: int

    @property
    def head(self) -> str:
        known = np.isfinite(self.after)
        before, after = self.before[known].mean(), self.after[known].mean()
        return f"{self.title}: loss {before:.3f} → {after:.3f} over {known.sum():,} trained tokens"

    def hardest(self, losses: np.ndarray, count: int = NAMED) -> list[int]:
        """Positions of the tokens with the highest losses, the highest first."""
        order = np.argsort(-np.nan_to_num(losses, nan=-1.0), kind="stable")
        return [i for i in order[:count].tolist() if np.isfinite(losses[i])]

    def pieces(self) -> Iterator[Warm]:
        """What is shown as one: a token, so many as make a character, or easy ones of a long sample."""
        many, start = np.isfinite(self.after[self.first : self.last]).sum() > MERGED, self.first
        while start < self.last:
            end = self.text.whole(start, start + 1, self.last)
            while many and end < self.last and self._easy(start, end) and self._easy(end, end + 1):
                end = self.text.whole(end, end + 1, self.last)
            yield Warm(start, end, _mean(self.before[start:end]), _mean(self.after[start:end]))
            start = end

    def _easy(self, start: int, end: int) -> bool:
        losses = np.concatenate([self.before[start:end], self.after[start:end]])
        return not np.isfinite(losses).any() or bool(np.nanmax(losses) < LEVELS[1])

    def __repr__(self) -> str:
        lines = [f"{self.head}, mode {self.mode}", *(f"! {REASONS[why]}" for why in self.why)]
        for place in self.hardest(self.after):
            change = f"{self.before[place]:8.3f} → {self.after[place]:.3f}"
            lines.append(f"{place:>7,}  {change:<20} {visible(around(self.text, place, place + 1))}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        legend = " ".join(
            _marked(f"{low:g} nats ({np.exp(-low):.0%})" if low else "easier", level)
            for level, low in enumerate(LEVELS)
        )
        left_out = int(np.isfinite(self.after).sum() - np.isfinite(self.after[self.first : self.last]).sum())
        more = f"<div style='color:{FAINT}'>{left_out:,} trained tokens more are not shown</div>" if left_out else ""
        return (
            f"<div style='{PANEL}'>{chip(self.mode)} &nbsp; <b>{inert(self.head)}</b>"
            f"<div style='color:{FAINT}'>loss of a token, and how likely it was, from {legend}; "
            f"position, id and both losses on hover</div>{''.join(warning(REASONS[why]) for why in self.why)}{more}"
            f"<div style='display:flex;flex-wrap:wrap;margin-top:6px'>{self._map('before')}{self._map('after')}</div>"
            "</div>"
        )

    def _map(self, which: str) -> str:
        losses = getattr(self, which)
        named = set(self.hardest(losses))
        body = "".join(self._piece(piece, getattr(piece, which), named) for piece in self.pieces())
        context = self.text.between(0, self.first)
        cut = "… " if len(context) > CONTEXT else ""
        return (
            f"<div style='flex:1 1 28em;min-width:0;margin-right:10px'><b>{which}</b>, mean {np.nanmean(losses):.3f}"
            f"<pre style='{BLOCK};background:#f4f4f4;color:#474747'>{cut}{escaped(context[-CONTEXT:])}</pre>"
            f"<pre style='{BLOCK};line-height:1.9;background:#ffffff;color:#474747'>{body}</pre></div>"
        )

    def _piece(self, piece: Warm, loss: float, named: set[int]) -> str:
        text = escaped(self.text.between(piece.start, piece.end))
        if not np.isfinite(loss):
            return f"<span style='color:#8c959f'>{text}</span>"
        number = f"<sub>{loss:.1f}</sub>" if piece.start in named and loss >= LEVELS[2] else ""
        ids = f", id {self.text.ids[piece.start]}" if piece.end - piece.start == 1 else f" to {piece.end - 1}"
        return _marked(text, level_of(loss), f"{piece.start}{ids}: {piece.before:.3f} → {piece.after:.3f}", number)


def show_losses(
    found: Comparison, number: int, tokenizer: PreTrainedTokenizerBase, odd: Sequence[Suspect] = ()
) -> HeatView:
    """Sample `number` with the loss of each token; of a long one the part around its hardest token.

    Args:
        number: -1 for the first of `odd`, or of all where there is none.
        odd: what `loss_comparison.suspects` found; why the sample is among them is told.

    Raises:
        ValueError: there is no such sample.
    """
    if number == -1:
        number = odd[0].sample if odd else 0
    if not 0 <= number < len(found):
        raise ValueError(f"{found.store.folder} has the samples 0 to {len(found) - 1}, and no {number}")
    why = next((suspect.why for suspect in odd if suspect.sample == number), ())
    ids, losses = found.store[number][0], found.after[number]
    trained = np.flatnonzero(np.isfinite(losses))
    hardest = int(np.searchsorted(trained, found.worst_at[number]))
    shown = trained[max(0, min(hardest - SHOWN // 2, len(trained) - SHOWN)) :][:SHOWN]
    title, mode = f"sample {number:,} of {len(found):,}", MODE_NAMES[found.modes[number]]
    first, last = int(shown[0]), int(shown[-1]) + 1
    return HeatView(title, mode, found.before[number], losses, TokenText(ids, tokenizer), why, first, last)


def around(text: TokenText, start: int, end: int) -> str:
    """Tokens `start` to `end` (exclusive) as ⟦text⟧ between what stands before and after them, on one line."""
    size = len(text.ids)
    start, end = _before(text, start), text.whole(start, end, size)
    first, last = _before(text, max(0, start - AROUND)), text.whole(start, min(size, end + AROUND), size)
    before, hard, after = (one_line(text.between(*part)) for part in ((first, start), (start, end), (end, last)))
    return f"{before}⟦{hard}⟧{after}"


def _before(text: TokenText, place: int) -> int:
    """`place`, moved back until it is none within a character."""
    while place and text.whole(place - 1, place, len(text.ids)) != place:
        place -= 1
    return place


def level_of(loss: float) -> int:
    """The place in LEVELS that a loss belongs to."""
    return int(np.searchsorted(LEVELS, max(loss, 0.0), side="right")) - 1


def _marked(text: str, level: int, title: str = "", number: str = "") -> str:
    background, ink = COLORS[level]
    said = f" title='{title}'" if title else ""
    rest = text.rstrip("\n")  # a number stands before the line breaks
    marked = f"{TAGS[level].format(rest)}{number}{text[len(rest) :]}"
    return f"<span{said} style='background:{background};color:{ink}'>{marked}</span>"


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
