"""A pack as it will be trained: whose samples lie in it, where they meet, and what is left over."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.data.store import TokenStore
from rsft_lib.display.html import FAINT, GAP, PANEL, Table, bar, one_line
from rsft_lib.display.mask.sample import SHIFT, STYLE, MaskView, show_sample
from rsft_lib.display.mask.segments import ANSWER

JUNCTIONS = 2  # places where two samples meet that are shown
ROWS = 12  # samples that are listed before the rest is folded
TOKENS, CHARACTERS = 24, 48  # of a sample's beginning and end that are shown
SEAM = "border-right:1px solid #ffffff"
EMPTY = "background:repeating-linear-gradient(135deg,#ffffff 0 4px,#b0b0b0 4px 6px)"


@dataclass(frozen=True)
class PackView:
    """The samples `numbers` of a store, one after the other in `seq_length` positions."""

    numbers: list[int]
    samples: list[MaskView]
    seq_length: int

    @cached_property
    def cu_seqlens(self) -> list[int]:
        """Where each sample begins, and the end; what is left over is a sample of its own that trains nothing."""
        ends = np.cumsum([0, *(len(view.ids) - 1 for view in self.samples)]).tolist()
        return ends + [self.seq_length] * (ends[-1] < self.seq_length)

    @property
    def header(self) -> str:
        filled = self.cu_seqlens[len(self.samples)]
        trained = sum(int(np.count_nonzero(view.weights[1:])) for view in self.samples)
        return (
            f"{len(self.samples):,} samples in {filled:,} of {self.seq_length:,} positions "
            f"({filled / self.seq_length:.1%}), {trained:,} of them in the loss; {self.seq_length - filled:,} are empty"
        )

    def contents(self, first: int = 0, last: int | None = None) -> Table:
        """The samples `first` to `last` of the pack, and where they lie."""
        rows, every = [], list(zip(self.numbers, self.samples, pairwise(self.cu_seqlens), strict=False))
        for number, view, (start, end) in every[first:last]:
            n, last = view.counts, len(view.ids)
            begins, ends = view.text.between(0, min(TOKENS, last)), view.text.between(max(0, last - TOKENS), last)
            shown = (f"{one_line(begins)[:CHARACTERS]} …", f"… {one_line(ends)[-CHARACTERS:]}")
            places = (f"{start:,} to {end - 1:,}", f"0 to {end - start - 1:,}")
            rows.append((str(number), view.mode, *places, n["tokens"], n["trained"], *shown))
        columns = ("sample", "mode", "in the pack", "position ids", "tokens", "trained", "begins", "ends")
        note = f"cu_seqlens {_listed(self.cu_seqlens)}: attention stays within a sample"
        return Table("a sample of n tokens takes n - 1 positions", columns, rows, note)

    def junctions(self) -> Table:
        """The last and the first positions where a sample ends and the next begins."""
        rows = []
        for k, end in enumerate(self.cu_seqlens[1 : len(self.samples)][:JUNCTIONS], start=1):
            before, after = self.samples[k - 1], self.samples[k]
            length = len(before.ids) - 1
            near = [(k - 1, before, i, end - length + i) for i in range(max(0, length - 2), length)]
            near += [(k, after, i, end + i) for i in range(min(2, len(after.ids) - 1))]
            rows += [(f"{place:,}", str(i), str(self.numbers[j]), *view.shift(i)) for j, view, i, place in near]
            rows.append((GAP,) * (len(SHIFT) + 3))
        title = "where samples meet, position ids restart, and EOS is predicted but never read"
        return Table(title, ("in the pack", "position id", "sample", *SHIFT), rows[:-1])

    def __repr__(self) -> str:
        return "\n\n".join([self.header, repr(self.junctions()), repr(self.contents())])

    def _repr_html_(self) -> str:
        parts = [
            (len(view.ids) - 1, f"sample {number}, {view.mode}", f"{_colour(view)};{SEAM}")
            for number, view in zip(self.numbers, self.samples, strict=True)
        ]
        empty = self.seq_length - self.cu_seqlens[len(self.samples)]
        parts += [(empty, f"{empty:,} empty positions", EMPTY)] * bool(empty)
        more = len(self.samples) - ROWS
        rest = f"<details><summary>{more} samples more</summary>{self.contents(ROWS)._repr_html_()}</details>"
        return (
            f"<div style='{PANEL}'><b>{self.header}</b>{bar(parts)}"
            f"<div style='color:{FAINT}'>the bar has a part for each sample; a striped one is empty</div>"
            f"{self.junctions()._repr_html_()}{self.contents(0, ROWS)._repr_html_()}{rest if more > 0 else ''}</div>"
        )


def show_pack(store: TokenStore, numbers: list[int], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> PackView:
    """A pack of `data.packing.pack`: the samples `numbers` of a store in `seq_length` positions.

    Raises:
        ValueError: they do not fit, or the mask of one of them is wrong.
    """
    needed = int((store.lengths[numbers] - 1).sum())
    if needed > seq_length:
        raise ValueError(f"samples {numbers} need {needed:,} positions, the pack has {seq_length:,}")
    return PackView(list(numbers), [show_sample(store, number, tokenizer) for number in numbers], seq_length)


def _colour(view: MaskView) -> str:
    return f"background:{STYLE.get(view.mode, STYLE[ANSWER])[2]}"


def _listed(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:10]} and {len(numbers) - 10} more"
