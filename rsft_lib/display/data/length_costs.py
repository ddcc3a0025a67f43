"""What a choice of length costs: over-long samples by policy, and positions that hold nothing by layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rsft_lib.data.packing import pack
from rsft_lib.display.data.sample_stats import MODES, Samples
from rsft_lib.display.html import Table

BATCH = 8  # samples that are padded to the longest of them
LEAST = 5  # logarithm of the smallest limit that is shown


@dataclass(frozen=True)
class Layout:
    """How samples are laid out in rows: the number of these, and of their positions."""

    name: str
    rows: int
    positions: int
    bytes: int  # on disk


def overlong_costs(samples: Samples, limits: Sequence[int] = ()) -> Table:
    """What each policy for over-long samples would cost at each `max_length` of `limits`, in tokens.

    `drop` loses whole samples and what they train. `truncate` cuts them: each loses its EOS, and so teaches to go on
    for ever, some lose `</think>` too, and some have nothing left that is trained. `error` stops. Of samples that
    were too long to be stored only the length is known.

    Args:
        limits: empty takes powers of two, the largest of which holds every sample.

    Returns:
        A column for each limit.
    """
    modes = samples.present + ["not stored"] * bool(len(samples.dropped))
    names = (
        "over-long samples", "share of all", *modes, "drop: tokens lost", "drop: trained tokens lost",
        "truncate: tokens lost", "truncate: without EOS", "truncate: without </think>", "truncate: nothing trained",
    )  # fmt: skip
    limits = list(limits) or _powers_of_two(samples)
    rows = list(zip(names, *(_overlong_column(samples, modes, limit) for limit in limits), strict=True))
    note = (
        f"{len(samples.dropped):,} samples were too long to be stored: their modes and masks are not known, so what "
        "they train and their </think> come on top; tokenize with a larger max_length to have them counted"
    )
    columns = ("max_length", *(f"{limit:,}" for limit in limits))
    return Table("what each policy for over-long samples costs", columns, rows, note if len(samples.dropped) else "")


def _overlong_column(samples: Samples, modes: list[str], limit: int) -> tuple:
    every = np.concatenate([samples.lengths, samples.dropped])
    excess, over = (every - limit).clip(min=0), samples.lengths > limit
    count = int((excess > 0).sum())
    by_mode = [int((over & samples.of(mode)).sum()) if mode in MODES else count - int(over.sum()) for mode in modes]
    return (
        count,
        count / len(every),
        *by_mode,
        _share(every[excess > 0], every),
        _share(samples.trained[over], samples.trained),
        _share(excess, every),
        count,
        int((over & (samples.closed > limit)).sum()),
        int((over & (samples.first >= limit)).sum()),
    )


def layouts(lengths: np.ndarray, seq_length: int, seed: int = 0) -> list[Layout]:
    """The samples packed; padded to the longest of a batch; and each padded to `seq_length`, as the original does.

    Args:
        lengths: int [samples], tokens; a sample takes one position fewer.

    Raises:
        ValueError: a sample does not fit into `seq_length`.
    """
    positions = lengths - 1
    packs = len(pack(positions, seq_length))
    begins = np.arange(0, len(positions), BATCH)
    longest = np.maximum.reduceat(np.random.default_rng(seed).permutation(positions), begins).astype(np.int64)
    padded = int((longest * np.diff(begins, append=len(positions))).sum())
    stored = 5 * int(lengths.sum(dtype=np.int64))  # int32 token and a byte of mask
    return [
        Layout("packed", packs, packs * seq_length, stored),
        Layout(f"padded to longest of {BATCH}", len(lengths), padded, stored),
        Layout("padded to seq_length", len(lengths), len(lengths) * seq_length, 8 * len(lengths) * seq_length),
    ]


def layout_costs(lengths: np.ndarray, seq_length: int) -> Table:
    """`layouts` as a table: what is useful of the positions that are computed, and what lies on disk."""
    useful, found = int((lengths - 1).sum(dtype=np.int64)), layouts(lengths, seq_length)
    columns = ("layout", "rows", "positions", "useful", "work", "on disk")
    rows = [
        (x.name, x.rows, x.positions, useful / x.positions, f"{x.positions / found[0].positions:.1f} x", _size(x.bytes))
        for x in found
    ]
    return Table(f"what a batch computes at seq_length {seq_length:,}", columns, rows)


def _powers_of_two(samples: Samples) -> list[int]:
    longest = max(int(lengths.max(initial=0)) for lengths in (samples.lengths, samples.dropped))
    top = max(LEAST, (longest - 1).bit_length())  # the least power that holds the longest
    return [2**power for power in range(max(LEAST, top - 4), top + 1)]


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(part.sum(dtype=np.int64) / whole.sum(dtype=np.int64))


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
