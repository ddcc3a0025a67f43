"""The cost of length settings: over-long samples by policy, and padding by batch layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rsft_lib.common.disk import format_size
from rsft_lib.data.packing import pack
from rsft_lib.display.data.sample_stats import Samples
from rsft_lib.display.html import Table
from rsft_lib.tokenizer.dialect import MODE_NAMES

BATCH = 8  # samples padded to the longest among them
MIN_POWER = 5  # of two: the smallest limit shown


@dataclass(frozen=True)
class Layout:
    """A batch layout: numbers of rows and of positions, for all samples."""

    name: str
    rows: int
    positions: int
    bytes: int  # on disk


def overlong_costs(samples: Samples, limits: Sequence[int] = ()) -> Table:
    """The cost of each policy for over-long samples at each `max_length` in `limits`, in tokens.

    `drop` removes whole samples. `truncate` cuts them: each loses its EOS, which teaches the model never to stop, some
    also lose `</think>`, and some keep no trained token. `error` stops. Only the length is known of samples that were
    too long to be stored.

    Args:
        limits: if empty, powers of two up to one that holds every sample.

    Returns:
        A table with one column per limit.
    """
    modes = samples.present + ["not stored"] * bool(len(samples.dropped))
    names = (
        "over-long samples", "share of all", *modes, "drop: tokens lost", "drop: trained tokens lost",
        "truncate: tokens lost", "truncate: without EOS", "truncate: without </think>", "truncate: nothing trained",
    )  # fmt: skip
    limits = list(limits) or _powers_of_two(samples)
    rows = list(zip(names, *(_overlong_column(samples, modes, limit) for limit in limits), strict=True))
    note = (
        f"{len(samples.dropped):,} samples were too long to be stored. Their modes and masks are unknown, so the rows "
        "on trained tokens and </think> exclude them; tokenize with a larger max_length to include them"
    )
    columns = ("max_length", *(f"{limit:,}" for limit in limits))
    return Table("cost of each policy for over-long samples", columns, rows, note if len(samples.dropped) else "")


def _overlong_column(samples: Samples, modes: list[str], limit: int) -> tuple:
    every = np.concatenate([samples.lengths, samples.dropped])
    excess, over = (every - limit).clip(min=0), samples.lengths > limit
    count = int((excess > 0).sum())
    by_mode = [
        int((over & samples.of(mode)).sum()) if mode in MODE_NAMES else count - int(over.sum()) for mode in modes
    ]
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
    """Three layouts: packed, padded to the longest of a batch, and padded to `seq_length` as the original code does.

    Args:
        lengths: int [samples], tokens; a sample of n tokens takes n - 1 positions.

    Raises:
        ValueError: a sample does not fit into `seq_length`.
    """
    positions = lengths - 1
    packs = len(pack(positions, seq_length))
    begins = np.arange(0, len(positions), BATCH)
    longest = np.maximum.reduceat(np.random.default_rng(seed).permutation(positions), begins).astype(np.int64)
    padded = int((longest * np.diff(begins, append=len(positions))).sum())
    stored = 5 * int(lengths.sum(dtype=np.int64))  # an int32 token and a mask byte
    return [
        Layout("packed", packs, packs * seq_length, stored),
        Layout(f"padded to longest of {BATCH}", len(lengths), padded, stored),
        Layout("padded to seq_length", len(lengths), len(lengths) * seq_length, 8 * len(lengths) * seq_length),
    ]


def layout_costs(lengths: np.ndarray, seq_length: int) -> Table:
    """`layouts` as a table: share of positions that are not padding, relative compute, and size on disk."""
    used, options = int((lengths - 1).sum(dtype=np.int64)), layouts(lengths, seq_length)
    columns = ("layout", "rows", "positions", "non-padding", "compute", "on disk")
    rows = [
        (
            x.name, x.rows, x.positions, used / x.positions, f"{x.positions / options[0].positions:.1f} x",
            format_size(x.bytes),
        )
        for x in options
    ]  # fmt: skip
    return Table(f"padding and compute at seq_length {seq_length:,}", columns, rows)


def _powers_of_two(samples: Samples) -> list[int]:
    longest = max(int(lengths.max(initial=0)) for lengths in (samples.lengths, samples.dropped))
    top = max(MIN_POWER, (longest - 1).bit_length())  # the least power of two that holds the longest
    return [2**power for power in range(max(MIN_POWER, top - 4), top + 1)]


def _share(part: np.ndarray, total: np.ndarray) -> float:
    return float(part.sum(dtype=np.int64) / total.sum(dtype=np.int64))
