"""A pack as it will be trained: its samples, their boundaries, and the padding."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.data.store import TokenStore
from rsft_lib.display.html import FAINT, GAP, PANEL, Table, bar, one_line
from rsft_lib.display.mask.sample import COLOR, SHIFT, MaskView, show_sample
from rsft_lib.display.mask.segments import ANSWER

JUNCTIONS = 2  # sample boundaries shown
ROWS = 12  # samples listed before the rest is folded
TOKENS, CHARACTERS = 24, 48  # shown of a sample's beginning and end
SEAM = "margin-right:1px"
PADDING = "background:repeating-linear-gradient(135deg,transparent 0 4px,#999999 4px 6px)"


@dataclass(frozen=True)
class PackView:
    """The samples `numbers` of a store, packed into `seq_length` positions."""

    numbers: list[int]
    samples: list[MaskView]
    seq_length: int

    @cached_property
    def ends(self) -> list[int]:
        """0 and the end of each sample."""
        return np.cumsum([0, *(len(view.ids) - 1 for view in self.samples)]).tolist()

    @property
    def cu_seqlens(self) -> list[int]:
        """Cumulative sequence lengths as in `PackedDataset.batch`."""
        ends = self.ends if len(self.samples) > 1 else [0]
        return ends + [self.seq_length] * (ends[-1] < self.seq_length)

    @property
    def header(self) -> str:
        filled = self.ends[-1]
        trained = sum(int(np.count_nonzero(view.weights[1:])) for view in self.samples)
        return (
            f"{len(self.samples):,} samples in {filled:,} of {self.seq_length:,} positions "
            f"({filled / self.seq_length:.1%}), {trained:,} in the loss; padding: {self.seq_length - filled:,}"
        )

    def contents(self, first: int = 0, last: int | None = None) -> Table:
        """Samples `first` to `last` of the pack and their positions."""
        rows, every = [], list(zip(self.numbers, self.samples, pairwise(self.ends), strict=True))
        for number, view, (start, end) in every[first:last]:
            n, last = view.counts, len(view.ids)
            begins, ends = view.text.between(0, min(TOKENS, last)), view.text.between(max(0, last - TOKENS), last)
            shown = (f"{one_line(begins)[:CHARACTERS]} …", f"… {one_line(ends)[-CHARACTERS:]}")
            places = (f"{start:,} to {end - 1:,}", f"0 to {end - start - 1:,}")
            rows.append((str(number), view.mode, *places, n["tokens"], n["trained"], *shown))
        columns = ("sample", "mode", "positions in pack", "position ids", "tokens", "trained", "begins", "ends")
        note = f"cu_seqlens {_listed(self.cu_seqlens)}: attention stays within a sample"
        return Table("samples of the pack; n tokens take n - 1 positions", columns, rows, note)

    def junctions(self) -> Table:
        """The last positions of a sample and the first of the next, at the first boundaries."""
        rows = []
        for k, end in enumerate(self.ends[1:-1][:JUNCTIONS], start=1):
            before, after = self.samples[k - 1], self.samples[k]
            length = len(before.ids) - 1
            near = [(k - 1, before, i, end - length + i) for i in range(max(0, length - 2), length)]
            near += [(k, after, i, end + i) for i in range(min(2, len(after.ids) - 1))]
            rows += [(f"{place:,}", str(i), str(self.numbers[j]), *view.shift(i)) for j, view, i, place in near]
            rows.append((GAP,) * (len(SHIFT) + 3))
        title = "sample boundaries: position ids restart, and EOS is predicted but never read"
        return Table(title, ("position in pack", "position id", "sample", *SHIFT), rows[:-1])

    def __repr__(self) -> str:
        return "\n\n".join([self.header, repr(self.junctions()), repr(self.contents())])

    def _repr_html_(self) -> str:
        parts = [
            (len(view.ids) - 1, f"sample {number}, {view.mode}", f"{_colour(view)};{SEAM}")
            for number, view in zip(self.numbers, self.samples, strict=True)
        ]
        padding = self.seq_length - self.ends[-1]
        parts += [(padding, f"{padding:,} padding positions", PADDING)] * bool(padding)
        more = len(self.samples) - ROWS
        rest = f"<details><summary>{more} more samples</summary>{self.contents(ROWS)._repr_html_()}</details>"
        return (
            f"<div style='{PANEL}'><b>{self.header}</b>{bar(parts)}"
            f"<div style='{FAINT}'>each part of the bar is a sample; striped: padding</div>"
            f"{self.junctions()._repr_html_()}{self.contents(0, ROWS)._repr_html_()}{rest if more > 0 else ''}</div>"
        )


def show_pack(store: TokenStore, numbers: list[int], tokenizer: PreTrainedTokenizerBase, seq_length: int) -> PackView:
    """A pack from `data.packing.pack`: samples `numbers` of a store in `seq_length` positions.

    Raises:
        ValueError: they do not fit, or a sample's mask is wrong.
    """
    needed = int((store.lengths[numbers] - 1).sum())
    if needed > seq_length:
        raise ValueError(f"samples {numbers} need {needed:,} positions, the pack has {seq_length:,}")
    return PackView(list(numbers), [show_sample(store, number, tokenizer) for number in numbers], seq_length)


def _colour(view: MaskView) -> str:
    return f"background:{COLOR.get(view.mode, COLOR[ANSWER])}"


def _listed(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"{numbers[:10]} and {len(numbers) - 10} more"
