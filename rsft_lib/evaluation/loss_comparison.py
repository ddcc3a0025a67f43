"""The loss of every trained token before and after a training: by sample and by kind, and which samples look wrong."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rsft_lib.data.span_kinds import KINDS, MODE_NAMES, SPAN_NAMES, control_tokens, kinds
from rsft_lib.data.store import TokenStore
from rsft_lib.evaluation.score import TokenLosses

CHUNK = 1 << 23  # tokens that are looked at together; takes some 500 MB
ODD = 4.0  # robust standard deviations from the other samples of a mode, in logarithms, from which on one is odd
LEAST = 0.05  # of a logarithm, as the spread of a mode at least
ROSE = 1.05  # times the loss before
TINY = 1e-4  # nats, so that the logarithm of no loss is a number


@dataclass(frozen=True)
class Comparison:
    """The samples of a store; float32 or int [samples], losses in nats per trained token."""

    before: TokenLosses
    after: TokenLosses
    trained: np.ndarray  # tokens in the loss
    loss_before: np.ndarray
    loss_after: np.ndarray
    worst: np.ndarray  # the largest loss of a token after the training
    worst_at: np.ndarray  # and its position
    modes: np.ndarray  # entries of MODE_NAMES
    same_as: np.ndarray  # the first sample with the same tokens; itself where there is none before it
    by_kind: np.ndarray  # float64 [3, KINDS]: tokens, sums of losses before and after

    @property
    def store(self) -> TokenStore:
        return self.after.store

    def __len__(self) -> int:
        return len(self.trained)


class Suspect(NamedTuple):
    """A sample that looks wrong, and why: names of REASONS."""

    sample: int
    why: tuple[str, ...]


REASONS = {
    "rose": "its loss is higher after the training than before",
    "outlier": "its loss is far above that of its mode",
    "surprise": "one of its tokens is far less likely than any in other samples: a wrong digit, a typo",
    "memorised": "its loss is far below that of its mode",
    "twice": "an earlier sample has the same tokens",
}


def compare(before: TokenLosses, after: TokenLosses) -> Comparison:
    """Read both once, a part at a time.

    Raises:
        ValueError: they are of different data, or of data without a trained token.
    """
    if before.manifest["data_sha256"] != after.manifest["data_sha256"]:
        raise ValueError(f"{before.store.folder} and {after.store.folder} are different data: score both on one")
    by_kind, parts, seen = np.zeros((3, KINDS)), [], {}
    for first, last in _chunks(after.store):
        columns, found = _part(before, after, first, last)
        by_kind += found
        parts.append((*columns, _same_as(after.store, first, last, seen)))
    if not by_kind[0].sum():
        raise ValueError(f"{after.store.folder} has no trained token")
    return Comparison(before, after, *(np.concatenate(column) for column in zip(*parts, strict=True)), by_kind)


def suspects(found: Comparison) -> list[Suspect]:
    """The samples with any of REASONS, the oddest first."""
    high, surprise = _oddness(found, found.loss_after), _oddness(found, found.worst)
    is_odd = {
        "rose": found.loss_after > ROSE * found.loss_before,
        "outlier": high > ODD,
        "surprise": surprise > ODD,
        "memorised": high < -ODD,
        "twice": found.same_as < np.arange(len(found)),
    }
    assert is_odd.keys() == REASONS.keys()
    score = np.maximum(np.abs(high), surprise) + 1000 * is_odd["rose"]
    numbers = np.flatnonzero(np.any(list(is_odd.values()), axis=0))
    numbers = numbers[np.argsort(-score[numbers], kind="stable")]
    return [Suspect(i, tuple(why for why, odd in is_odd.items() if odd[i])) for i in numbers.tolist()]


def chosen(found: list[Suspect], reasons: str) -> list[int]:
    """The samples that are suspected for one of some reasons, parted by commas.

    Raises:
        ValueError: there is no such reason.
    """
    wanted = {reason.strip() for reason in reasons.split(",")} - {""}
    if unknown := wanted - REASONS.keys():
        raise ValueError(f"no reason is called {', '.join(sorted(unknown))}; there are {', '.join(REASONS)}")
    return [suspect.sample for suspect in found if wanted & set(suspect.why)]


def typical(found: Comparison) -> list[int]:
    """Of each mode the sample with the median loss after the training."""
    by_mode = (np.flatnonzero(found.modes == mode) for mode in np.unique(found.modes))
    return [int(numbers[np.argsort(found.loss_after[numbers])[len(numbers) // 2]]) for numbers in by_mode]


def hardest_spans(found: Comparison, count: int, width: int) -> list[tuple[int, int]]:
    """(sample, position) of the `count` stretches of `width` trained tokens whose mean loss is highest after the
    training; one of each sample at most.
    """
    best = np.zeros((0, 3))  # mean loss, sample, position
    for first, last in _chunks(found.store):
        begins, values = _values(found.after, first, last)
        known = np.isfinite(values)
        sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0)]), dtype=np.float64)
        counts = np.cumsum(np.concatenate([[0], known]))
        means = np.full(len(values), -np.inf)
        whole = counts[width:] - counts[:-width] == width if len(values) >= width else np.zeros(0, dtype=bool)
        means[: len(whole)][whole] = (sums[width:] - sums[:-width])[whole] / width
        top = np.maximum.reduceat(means, begins)
        places = _first_places(means == np.repeat(top, found.store.lengths[first:last]), begins)
        rows = np.stack([top, np.arange(first, last), places - begins], axis=1)
        rows = np.concatenate([best, rows[np.isfinite(top)]])
        best = rows[np.argsort(-rows[:, 0], kind="stable")][:count]
    return [(int(sample), int(position)) for _, sample, position in best]


def _chunks(store: TokenStore) -> Iterator[tuple[int, int]]:
    """(first, last) samples, the last exclusive, of so many at a time."""
    begins, sample = store.ends - store.lengths, 0
    while sample < len(store):
        last = max(sample + 1, int(np.searchsorted(store.ends, begins[sample] + CHUNK, side="right")))
        yield sample, last
        sample = last


def _values(losses: TokenLosses, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """(where each sample begins, the losses of all their tokens)."""
    ends, lengths = losses.store.ends[first:last], losses.store.lengths[first:last]
    start = ends[0] - lengths[0]
    return ends - lengths - start, np.array(losses.values[start : ends[-1]])


def _part(before: TokenLosses, after: TokenLosses, first: int, last: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(columns of Comparison up to `modes`, sums by kind) of the samples `first` to `last`."""
    begins, later = _values(after, first, last)
    earlier, known = _values(before, first, last)[1], np.isfinite(later)
    lengths, counts = after.store.lengths[first:last], np.add.reduceat(known, begins, dtype=np.int64)
    means = [
        (np.add.reduceat(np.where(known, v, 0), begins, dtype=np.float64) / np.maximum(counts, 1)).astype(np.float32)
        for v in (earlier, later)
    ]
    filled = np.where(known, later, -np.inf)
    worst = np.maximum.reduceat(filled, begins)
    worst_at = _first_places(filled == np.repeat(worst, lengths), begins) - begins
    found = _kinds(after.store, first, last, known)
    first_trained = np.minimum(_first_places(known, begins), len(known) - 1)
    modes = np.where(counts > 0, found[first_trained] // len(SPAN_NAMES), len(MODE_NAMES) - 1)
    sums = [np.bincount(found[known], w, minlength=KINDS) for w in (None, earlier[known], later[known])]
    return (counts, *means, worst, worst_at, modes), np.array(sums)


def _kinds(store: TokenStore, first: int, last: int, trained: np.ndarray) -> np.ndarray:
    """The kind of each token of the samples `first` to `last`, uint8; one that is not trained has any."""
    control = control_tokens(store)
    if control is None:
        return np.full(len(trained), (len(MODE_NAMES) - 1) * len(SPAN_NAMES) + SPAN_NAMES.index("answer"), np.uint8)
    # Samples may follow each other without a gap: the first token of each is not trained.
    tokens = np.concatenate([store[i][0] for i in range(first, last)])
    return kinds(tokens, trained, control)


def _same_as(store: TokenStore, first: int, last: int, seen: dict[bytes, int]) -> np.ndarray:
    digests = (hashlib.blake2b(store[i][0].tobytes(), digest_size=16).digest() for i in range(first, last))
    return np.array([seen.setdefault(digest, i) for i, digest in enumerate(digests, start=first)])


def _first_places(wanted: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Where the first True at or after each of `begins` is; the length where there is none."""
    places = np.append(np.flatnonzero(wanted), len(wanted))
    return places[np.searchsorted(places, begins)]


def _oddness(found: Comparison, losses: np.ndarray) -> np.ndarray:
    """How many robust standard deviations each sample is from the median of its mode, in logarithms: float [samples].

    The median absolute deviation is 0.6745 standard deviations of a normal distribution, and odd ones do not move it.
    """
    logs, odd = np.log(np.maximum(losses, TINY)), np.zeros(len(losses))
    for mode in np.unique(found.modes):
        chosen = found.modes == mode
        off = logs[chosen] - np.median(logs[chosen])
        odd[chosen] = off / max(np.median(np.abs(off)) / 0.6745, LEAST)
    return odd
