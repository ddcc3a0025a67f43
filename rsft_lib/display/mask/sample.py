"""The loss mask of a sample, as HTML that stays readable under papermill, on GitHub and without colour.

The mask applies to targets: position i reads token i and predicts token i + 1, and its loss counts if token i + 1 is
trained. Tokens shown as trained are the targets in the loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.common.visible import visible
from rsft_lib.data.store import TokenStore
from rsft_lib.display.html import BLOCK, FAINT, GAP, PANEL, Table, bar, escaped, inert, tint, warning
from rsft_lib.display.mask.segments import (
    ANSWER,
    CONTEXT,
    DEFAULT_WEIGHTS,
    END,
    FORCED,
    SHORT_ANSWER,
    THOUGHT,
    Forms,
    Marks,
    Segment,
    remarks,
    segments,
)
from rsft_lib.display.mask.token_text import Piece, TokenText
from rsft_lib.display.plot_style import BLUE, GREEN, GREY, ORANGE, PINK
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.dialect import THINKLESS, Dialect

BOUNDARIES = 8  # mask boundaries shown in the label-shift table
SHIFT = ("reads id", "reads", "predicts id", "predicts", "in the loss")
LEGEND = "● trained · ○ not trained · ↵ line break · boxed: added tokens · hover over segment boundaries for ids"

# By kind of segment.
COLOR = {CONTEXT: GREY, THOUGHT: BLUE, FORCED: GREY, ANSWER: GREEN, SHORT_ANSWER: ORANGE, END: PINK}


@dataclass(frozen=True)
class MaskView:
    """A sample: `ids` int [tokens], `weights` float [tokens] (loss weight as a target), and its segments."""

    ids: np.ndarray
    weights: np.ndarray
    segments: list[Segment]
    remarks: list[str]
    text: TokenText
    title: str
    mode: str

    @cached_property
    def counts(self) -> dict[str, int]:
        """Numbers of tokens, trained tokens, and contiguous trained spans."""
        trained = self.weights != 0
        begins = np.diff(trained.astype(np.int8), prepend=0) == 1
        return {"tokens": len(self.ids), "trained": int(trained.sum()), "spans": int(begins.sum())}

    @property
    def header(self) -> str:
        n = self.counts
        spans = f"{n['spans']} span{'s' if n['spans'] > 1 else ''}"
        return f"{n['tokens']:,} tokens, {n['trained']:,} trained ({n['trained'] / n['tokens']:.1%}) in {spans}"

    @property
    def ends(self) -> str:
        """The first and the last trained token."""
        first, last = np.flatnonzero(self.weights)[[0, -1]].tolist()
        tokens = (f"{self.text.token(i)} at {i:,} (id {self.ids[i]})" for i in (first, last))
        return "first trained {}, last {}".format(*tokens)

    def label_shift(self) -> Table:
        """What positions read and predict around the boundaries of the mask."""
        changes = (np.flatnonzero(np.diff(self.weights != 0)) + 1).tolist()  # the first token after the change
        places = {*changes[: BOUNDARIES - 1], *changes[-1:], len(self.ids) - 1}
        near = {i for place in places for i in range(place - 3, place + 2) if 0 <= i < len(self.ids) - 1}
        note = f"{len(changes) - BOUNDARIES} more boundaries are not shown" if len(changes) > BOUNDARIES else ""
        rows: list[tuple[str, ...]] = []
        for i in sorted(near):
            if rows and i - 1 not in near:
                rows.append((GAP,) * (1 + len(SHIFT)))
            rows.append((str(i), *self.shift(i)))
        return Table("position i reads token i and predicts token i + 1", ("position", *SHIFT), rows, note)

    def shift(self, i: int) -> tuple[str, ...]:
        """Cells for the columns SHIFT: what position `i` reads and predicts, and whether that is in the loss."""
        weight = self.weights[i + 1]
        counts = "○ no" if not weight else "● yes" if weight == 1 else f"● times {weight:g}"
        return str(self.ids[i]), self.text.token(i), str(self.ids[i + 1]), self.text.token(i + 1), counts

    def __repr__(self) -> str:
        head = " · ".join(filter(None, (self.title, f"mode {self.mode}", self.header)))
        lines = [head, self.ends, *(f"! {remark}" for remark in self.remarks)]
        for segment in self.segments:
            lines += ["", f"{_label(segment):<20} {_extent(segment)}"]
            gutter = "  # " if segment.trained else "  | "  # on every line, so that text cannot imitate a label
            lines += [gutter + line for line in _unfolded(self.text.pieces(segment.start, segment.end)).split("\n")]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"{inert(self.title)} &nbsp; " if self.title else ""
        summary = "label shift: what each position predicts at the boundaries of the mask"
        return (
            f"<div style='{PANEL}'>{chip(self.mode)} &nbsp; {title}<b>{self.header}</b>"
            f"<div style='{FAINT}'>{inert(self.ends)}</div>"
            f"<div style='{FAINT}'>{LEGEND}</div>{''.join(warning(remark) for remark in self.remarks)}"
            f"{bar([(len(s), f'{_label(s)}, {_extent(s)}', f'background:{COLOR[s.kind]}') for s in self.segments])}"
            f"{self.body()}<details><summary>{summary}</summary>{self.label_shift()._repr_html_()}</details></div>"
        )

    def body(self) -> str:
        """The segments as HTML, top to bottom."""
        return "".join(_segment_html(s, self.text.pieces(s.start, s.end)) for s in self.segments)


def show_sample(store: TokenStore, number: int, tokenizer: PreTrainedTokenizerBase) -> MaskView:
    """Sample `number` of a store, as written to disk.

    Raises:
        ValueError: there is no such sample, or all or none of its targets are trained.
    """
    if not 0 <= number < len(store):
        raise ValueError(f"no sample {number}: {store.folder} has samples 0 to {len(store) - 1}")
    title = f"sample {number:,} of {len(store):,}"
    weights = getattr(store, "weights", DEFAULT_WEIGHTS)
    return show_mask(*store[number], tokenizer, weights=weights, title=title, dialect=store.dialect)


def show_mask(
    ids: Sequence[int],
    loss_mask: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    title: str = "",
    dialect: Dialect = THINKLESS,
) -> MaskView:
    """A sample divided into trained and untrained segments.

    Args:
        ids: int [tokens].
        loss_mask: int [tokens], index into `weights`: the weight of each token as a target.

    Raises:
        ValueError: all or none of the targets are trained.
    """
    ids, targets = np.asarray(ids), np.asarray(weights, dtype=np.float32)[np.asarray(loss_mask)]
    trained = np.count_nonzero(targets[1:])  # no position predicts the first token
    if trained in (0, len(ids) - 1):
        raise ValueError(
            f"{title or 'this sample'}: {trained} of {len(ids) - 1} targets are trained, so the mask is wrong; check "
            "the chat template (notebook 01_patch_tokenizer)"
        )
    marks, forms = Marks.of(tokenizer), Forms.of(tokenizer, dialect)
    warnings = ["the first token is marked as trained, but no position predicts it"] * bool(targets[0])
    targets[0] = 0
    parts = segments(ids, targets, marks, forms)
    mode = forms.mode_at(ids, int(np.flatnonzero(targets)[0]))
    warnings += remarks(ids, parts, marks, forms)
    return MaskView(ids, targets, parts, warnings, TokenText(ids, tokenizer), title, mode)


def literal_example(tokenizer: PreTrainedTokenizerBase, dialect: Dialect) -> Table:
    """Every token of five messages with its mask, one row per run of trained or untrained tokens.

    Four, if the chat template refuses a system prompt.
    """
    think, short = dialect.write("think", "\ntwo and two\n", "\n\nfour"), dialect.write("short", "", "six")
    talk = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": dialect.ask("2 + 2 ?", "think")}, {"role": "assistant", "content": think},
        {"role": "user", "content": dialect.ask("3 + 3 ?", "short")}, {"role": "assistant", "content": short},
    ]  # fmt: skip
    try:
        encoded = encode(tokenizer, talk, context=dialect.context)
    except ValueError:
        encoded = encode(tokenizer, talk[1:], context=dialect.context)
    text, rows = TokenText(np.asarray(encoded.ids), tokenizer), []
    for trained, run in groupby(range(len(encoded.ids)), lambda i: encoded.loss_mask[i] > 0):
        places = list(run)
        mask = " ".join("1" if trained else "0" for _ in places)
        rows.append(("● trained" if trained else "○ context", " ".join(map(text.token, places)), mask))
    return Table(f"five messages: {len(encoded.ids)} tokens and their loss mask", ("", "tokens", "mask"), rows)


def chip(kind: str) -> str:
    color = COLOR.get(kind, COLOR[ANSWER])
    style = f"{tint(color, 0.25)};border:1px solid {color};padding:1px 10px;border-radius:10px"
    return f"<b style='{style}'>{kind}</b>"


def _label(segment: Segment) -> str:
    weight = f" × {segment.weight:g}" if segment.weight not in (0, 1) else ""
    return f"{'●' if segment.trained else '○'} {segment.kind}{weight}"


def _extent(segment: Segment) -> str:
    place = f"{segment.start:,}" if len(segment) == 1 else f"{segment.start:,} to {segment.end - 1:,}"
    return f"{len(segment):,} token{'s' if len(segment) > 1 else ''}, {place}"


def _segment_html(segment: Segment, pieces: Iterable[Piece]) -> str:
    color = COLOR[segment.kind]
    blocks = []
    for folded, grouped in groupby(pieces, lambda piece: piece.folded):
        group = list(grouped)
        block = f"<pre style='{BLOCK}'>{''.join(map(_piece_html, group))}</pre>"
        if folded:
            more = f"{group[-1].end - group[0].start:,} more tokens, {group[0].start:,} to {group[-1].end - 1:,}"
            block = f"<details><summary style='padding-left:8px'>{more}</summary>{block}</details>"
        blocks.append(block)
    return (
        f"<div style='display:flex;margin:3px 0;{tint(color)};border-left:6px solid {color}'>"
        f"<div style='flex:0 0 14em;padding:3px 8px'><b>{_label(segment)}</b> &nbsp; "
        f"<span style='white-space:nowrap'>{_extent(segment)}</span></div>"
        f"<div style='flex:1 1 0;min-width:0'>{''.join(blocks)}</div></div>"
    )


def _piece_html(piece: Piece) -> str:
    place = str(piece.start) if piece.end - piece.start == 1 else f"{piece.start} to {piece.end - 1}"
    ids = f", id {' '.join(map(str, piece.ids))}" if piece.ids else ""
    style = " style='border:1px solid;border-radius:3px;padding:0 2px'" if piece.boxed else ""
    return f"<span title='{place}{ids}'{style}>{escaped(piece.text)}</span>"


def _unfolded(pieces: Iterable[Piece]) -> str:
    text = []
    for folded, grouped in groupby(pieces, lambda piece: piece.folded):
        group = list(grouped)
        more = f"\n... {group[-1].end - group[0].start:,} more tokens ...\n"
        text.append(more if folded else visible("".join(piece.text for piece in group)))
    return "".join(text)
