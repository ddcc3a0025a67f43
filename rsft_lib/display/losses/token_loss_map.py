"""Heat map of token losses over the text of a sample, before and after a training, readable without colour."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.common.visible import visible
from rsft_lib.data.span_kinds import MODE_NAMES
from rsft_lib.display.html import BLOCK, FAINT, PANEL, escaped, inert, one_line, tint, warning
from rsft_lib.display.mask.sample import chip
from rsft_lib.display.mask.token_text import TokenText
from rsft_lib.display.plot_style import NEUTRAL
from rsft_lib.evaluation.loss_comparison import REASONS, Comparison, Suspect

# Lower bound of each level in nats, and its style and tags. Hard tokens are also underlined, then bold, and the hardest
# have their loss as a subscript.
LEVELS = (0.0, 0.1, 0.5, 1.5, 4.0)
HEAT = "#f07d1a"
STYLES = ("", tint(HEAT, 0.12), tint(HEAT, 0.25), tint(HEAT, 0.38), f"background:{HEAT};color:#000000")
TAGS = ("{}", "{}", "<u>{}</u>", "<b><u>{}</u></b>", "<b><u>{}</u></b>")
NAMED = 8  # hardest tokens, shown with their loss
SHOWN = 1200  # most trained tokens shown
MERGED = 300  # with more trained tokens than this, adjacent easy ones are merged
CONTEXT = 240  # characters shown before the answer
AROUND = 24  # tokens of context on each side in `around`


class TokenGroup(NamedTuple):
    """Tokens `start` to `end` (exclusive), displayed together, with their mean loss `before` and `after`."""

    start: int
    end: int
    before: float
    after: float


@dataclass(frozen=True)
class HeatView:
    """A sample; losses are float32 [tokens], NaN if untrained; tokens `first` to `last` (exclusive) are shown."""

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
        """Positions of the tokens with the highest losses, in descending order."""
        order = np.argsort(-np.nan_to_num(losses, nan=-1.0), kind="stable")
        return [i for i in order[:count].tolist() if np.isfinite(losses[i])]

    def pieces(self) -> Iterator[TokenGroup]:
        """The groups in order: a token, the tokens of one character, or a run of easy tokens of a long sample."""
        many, start = np.isfinite(self.after[self.first : self.last]).sum() > MERGED, self.first
        while start < self.last:
            end = self.text.grapheme_end(start, start + 1, self.last)
            while many and end < self.last and self._easy(start, end) and self._easy(end, end + 1):
                end = self.text.grapheme_end(end, end + 1, self.last)
            yield TokenGroup(start, end, _mean(self.before[start:end]), _mean(self.after[start:end]))
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
        more = f"<div style='{FAINT}'>{left_out:,} more trained tokens are not shown</div>" if left_out else ""
        return (
            f"<div style='{PANEL}'>{chip(self.mode)} &nbsp; <b>{inert(self.head)}</b>"
            f"<div>token loss (and probability) from {legend}; "
            f"hover for position, id and both losses</div>{''.join(warning(REASONS[why]) for why in self.why)}{more}"
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
            f"<pre style='{BLOCK};{tint(NEUTRAL)}'>{cut}{escaped(context[-CONTEXT:])}</pre>"
            f"<pre style='{BLOCK};line-height:1.9'>{body}</pre></div>"
        )

    def _piece(self, piece: TokenGroup, loss: float, named: set[int]) -> str:
        text = escaped(self.text.between(piece.start, piece.end))
        if not np.isfinite(loss):
            return f"<span style='{FAINT}'>{text}</span>"
        number = f"<sub>{loss:.1f}</sub>" if piece.start in named and loss >= LEVELS[2] else ""
        ids = f", id {self.text.ids[piece.start]}" if piece.end - piece.start == 1 else f" to {piece.end - 1}"
        return _marked(text, level_of(loss), f"{piece.start}{ids}: {piece.before:.3f} → {piece.after:.3f}", number)


def show_losses(
    comparison: Comparison, number: int, tokenizer: PreTrainedTokenizerBase, suspects: Sequence[Suspect] = ()
) -> HeatView:
    """Sample `number` with the loss of each token; of a long sample, the part around its hardest token.

    Args:
        number: -1 for the first of `suspects`, or sample 0 if there are none.
        suspects: from `loss_comparison.suspects`; the reasons are shown with the sample.

    Raises:
        ValueError: there is no such sample.
    """
    if number == -1:
        number = suspects[0].sample if suspects else 0
    if not 0 <= number < len(comparison):
        raise ValueError(f"no sample {number}: {comparison.store.folder} has samples 0 to {len(comparison) - 1}")
    why = next((suspect.why for suspect in suspects if suspect.sample == number), ())
    ids, losses = comparison.store[number][0], comparison.after[number]
    trained = np.flatnonzero(np.isfinite(losses))
    hardest = int(np.searchsorted(trained, comparison.worst_at[number]))
    shown = trained[max(0, min(hardest - SHOWN // 2, len(trained) - SHOWN)) :][:SHOWN]
    title, mode = f"sample {number:,} of {len(comparison):,}", MODE_NAMES[comparison.modes[number]]
    first, last = int(shown[0]), int(shown[-1]) + 1
    return HeatView(title, mode, comparison.before[number], losses, TokenText(ids, tokenizer), why, first, last)


def around(text: TokenText, start: int, end: int) -> str:
    """Tokens `start` to `end` (exclusive) as ⟦text⟧ with AROUND tokens of context on each side, on one line."""
    size = len(text.ids)
    start, end = _before(text, start), text.grapheme_end(start, end, size)
    first, last = _before(text, max(0, start - AROUND)), text.grapheme_end(start, min(size, end + AROUND), size)
    before, hard, after = (one_line(text.between(*part)) for part in ((first, start), (start, end), (end, last)))
    return f"{before}⟦{hard}⟧{after}"


def _before(text: TokenText, place: int) -> int:
    """`place`, moved back to a grapheme boundary."""
    while place and text.grapheme_end(place - 1, place, len(text.ids)) != place:
        place -= 1
    return place


def level_of(loss: float) -> int:
    """The index in LEVELS of a loss."""
    return int(np.searchsorted(LEVELS, max(loss, 0.0), side="right")) - 1


def _marked(text: str, level: int, title: str = "", number: str = "") -> str:
    hover = f" title='{title}'" if title else ""
    rest = text.rstrip("\n")  # put the number before trailing line breaks
    marked = f"{TAGS[level].format(rest)}{number}{text[len(rest) :]}"
    return f"<span{hover} style='{STYLES[level]}'>{marked}</span>"


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
