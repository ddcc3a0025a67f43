"""Losses of all trained tokens before and after a training: by sample, by kind (mode and span), and suspect samples.

A suspect is a sample whose losses hint at a data error: `suspects` decides, REASONS words it. The control token is left
out: its loss only shows that nothing in a question determines the mode, ln 2 for equally frequent modes.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rsft_lib.data.span_kinds import KINDS, MODE_NAMES, SPAN_NAMES, control_tokens, kinds
from rsft_lib.data.store import TokenStore
from rsft_lib.evaluation.token_losses import TokenLosses

CHUNK = 1 << 23  # tokens per chunk; takes some 500 MB
OUTLIER = 4.0  # robust z-score of a sample's log loss within its mode, above which it is suspect
MIN_SPREAD = 0.05  # smallest standard deviation assumed for the log losses of a mode
ROSE = 1.05  # ratio of the loss after to the loss before, above which it has risen
GAP = 0.1  # nats per token by which a suspect's loss must differ: among tiny losses, large ratios mean nothing
SURPRISE = 3.0  # nats by which the worst token of a suspect must exceed the median of its mode
CONTROL = SPAN_NAMES.index("control")
TINY = 1e-4  # nats, so that the logarithm of a zero loss is finite


@dataclass(frozen=True)
class Comparison:
    """One entry per sample of a store: float32 or int [samples], losses in nats per trained token.

    The losses of samples leave out the control token.
    """

    before: TokenLosses
    after: TokenLosses
    by_kind: np.ndarray  # float64 [3, KINDS]: token counts, summed losses before, summed losses after
    trained: np.ndarray  # trained tokens
    loss_before: np.ndarray
    loss_after: np.ndarray
    worst: np.ndarray  # highest token loss after the training; -inf without any
    worst_at: np.ndarray  # its position
    modes: np.ndarray  # indices into MODE_NAMES
    same_as: np.ndarray  # first sample with the same tokens: its own index unless it is a duplicate

    @property
    def store(self) -> TokenStore:
        return self.after.store

    def __len__(self) -> int:
        return len(self.trained)


class Suspect(NamedTuple):
    """A suspect sample, and why: keys of REASONS."""

    sample: int
    why: tuple[str, ...]


REASONS = {
    "rose": "its loss rose during the training",
    "outlier": "its loss is far above the median of its mode",
    "surprise": "its highest token loss is far above that of other samples, as for a typo or a wrong digit",
    "memorised": "its loss is far below the median of its mode",
    "twice": "an earlier sample has the same tokens (duplicate)",
}


def compare(before: TokenLosses, after: TokenLosses) -> Comparison:
    """Compare two sets of token losses, in chunks.

    Raises:
        ValueError: they are of different data, or the data has no trained token.
    """
    if before.manifest["data_sha256"] != after.manifest["data_sha256"]:
        raise ValueError(f"{before.store.folder} and {after.store.folder} are different data: score both on the same")
    by_kind, parts = np.zeros((3, KINDS)), []
    seen: dict[bytes, int] = {}
    for first, last in after.store.chunks(CHUNK):
        columns, sums = _part(before, after, first, last)
        by_kind += sums
        parts.append((*columns, _same_as(after.store, first, last, seen)))
    if not by_kind[0].sum():
        raise ValueError(f"{after.store.folder} has no trained token")
    by_sample = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Comparison(before, after, by_kind, *by_sample)


def suspects(comparison: Comparison) -> list[Suspect]:
    """The suspect samples: those whose loss rose first, then by decreasing z-score."""
    after, change = comparison.loss_after, comparison.loss_after - comparison.loss_before
    (high, above), (surprise, over) = (_deviations(comparison, losses) for losses in (after, comparison.worst))
    applies = {
        "rose": (after > ROSE * comparison.loss_before) & (change > GAP),
        "outlier": (high > OUTLIER) & (above > GAP),
        "surprise": (surprise > OUTLIER) & (over > SURPRISE),
        "memorised": (high < -OUTLIER) & (above < -GAP),
        "twice": comparison.same_as < np.arange(len(comparison)),
    }
    assert applies.keys() == REASONS.keys()
    score = np.maximum(np.abs(high), surprise) + 1000 * applies["rose"]
    numbers = np.flatnonzero(np.any(list(applies.values()), axis=0))
    numbers = numbers[np.argsort(-score[numbers], kind="stable")]
    return [Suspect(i, tuple(why for why, flags in applies.items() if flags[i])) for i in numbers.tolist()]


def chosen(suspected: list[Suspect], reasons: str) -> list[int]:
    """The samples suspected for any of `reasons`, which are comma-separated.

    Raises:
        ValueError: a reason is unknown.
    """
    wanted = {reason.strip() for reason in reasons.split(",")} - {""}
    if unknown := wanted - REASONS.keys():
        raise ValueError(f"unknown reason {', '.join(sorted(unknown))}; choose from {', '.join(REASONS)}")
    return [suspect.sample for suspect in suspected if wanted & set(suspect.why)]


def typical(comparison: Comparison) -> list[int]:
    """The sample with the median loss after the training, for each mode."""
    by_mode = (np.flatnonzero(comparison.modes == mode) for mode in np.unique(comparison.modes))
    return [int(numbers[np.argsort(comparison.loss_after[numbers])[len(numbers) // 2]]) for numbers in by_mode]


def hardest_spans(comparison: Comparison, count: int, width: int) -> list[tuple[int, int]]:
    """(sample, position) of the `count` spans of `width` trained tokens with the highest mean loss after the training.

    At most one span per sample, without the control token.
    """
    best = np.zeros((0, 3))  # mean loss, sample, position
    for first, last in comparison.store.chunks(CHUNK):
        begins, values = _values(comparison.after, first, last)
        known = np.isfinite(values)
        known &= _kinds(comparison.store, first, last, known) % len(SPAN_NAMES) != CONTROL
        sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0)]), dtype=np.float64)
        counts = np.cumsum(np.concatenate([[0], known]))
        means = np.full(len(values), -np.inf)
        complete = counts[width:] - counts[:-width] == width if len(values) >= width else np.zeros(0, dtype=bool)
        means[: len(complete)][complete] = (sums[width:] - sums[:-width])[complete] / width
        top = np.maximum.reduceat(means, begins)
        places = _first_places(means == np.repeat(top, comparison.store.lengths[first:last]), begins)
        rows = np.stack([top, np.arange(first, last), places - begins], axis=1)
        rows = np.concatenate([best, rows[np.isfinite(top)]])
        best = rows[np.argsort(-rows[:, 0], kind="stable")][:count]
    return [(int(sample), int(position)) for _, sample, position in best]


def _values(losses: TokenLosses, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """(start of each sample, losses of all tokens) of samples `first` to `last`."""
    ends, lengths = losses.store.ends[first:last], losses.store.lengths[first:last]
    start = ends[0] - lengths[0]
    return ends - lengths - start, np.array(losses.values[start : ends[-1]])


def _part(before: TokenLosses, after: TokenLosses, first: int, last: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """(columns of Comparison from `trained` to `modes`, sums by kind) of samples `first` to `last`."""
    begins, later = _values(after, first, last)
    earlier, known = _values(before, first, last)[1], np.isfinite(later)
    lengths, counts = after.store.lengths[first:last], np.add.reduceat(known, begins, dtype=np.int64)
    token_kinds = _kinds(after.store, first, last, known)
    judged = known & (token_kinds % len(SPAN_NAMES) != CONTROL)
    number = np.maximum(np.add.reduceat(judged, begins, dtype=np.int64), 1)
    means = [
        (np.add.reduceat(np.where(judged, v, 0), begins, dtype=np.float64) / number).astype(np.float32)
        for v in (earlier, later)
    ]
    filled = np.where(judged, later, -np.inf)
    worst = np.maximum.reduceat(filled, begins)
    worst_at = _first_places(filled == np.repeat(worst, lengths), begins) - begins
    first_trained = np.minimum(_first_places(known, begins), len(known) - 1)
    modes = np.where(counts > 0, token_kinds[first_trained] // len(SPAN_NAMES), len(MODE_NAMES) - 1)
    sums = [np.bincount(token_kinds[known], w, minlength=KINDS) for w in (None, earlier[known], later[known])]
    return (counts, *means, worst, worst_at, modes), np.array(sums)


def _kinds(store: TokenStore, first: int, last: int, trained: np.ndarray) -> np.ndarray:
    """The kind of each token of samples `first` to `last`, uint8; arbitrary for untrained tokens."""
    control = control_tokens(store)
    if control is None:
        return np.full(len(trained), (len(MODE_NAMES) - 1) * len(SPAN_NAMES) + SPAN_NAMES.index("answer"), np.uint8)
    # Answers of adjacent samples do not merge, since the first token of a sample is untrained.
    tokens = np.concatenate([store[i][0] for i in range(first, last)])
    return kinds(tokens, trained, control)


def _same_as(store: TokenStore, first: int, last: int, seen: dict[bytes, int]) -> np.ndarray:
    digests = (hashlib.blake2b(store[i][0].tobytes(), digest_size=16).digest() for i in range(first, last))
    return np.array([seen.setdefault(digest, i) for i, digest in enumerate(digests, start=first)])


def _first_places(wanted: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The position of the first True at or after each of `begins`; `len(wanted)` if there is none."""
    places = np.append(np.flatnonzero(wanted), len(wanted))
    return places[np.searchsorted(places, begins)]


def _deviations(comparison: Comparison, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each sample is from the median of its mode, float [samples]: robust z-score of its log loss, and nats.

    The scale is the median absolute deviation, which is 0.6745 standard deviations of a normal distribution.
    """
    logs, scores, nats = np.log(np.maximum(losses, TINY)), np.zeros(len(losses)), np.zeros(len(losses))
    for mode in np.unique(comparison.modes):
        chosen = comparison.modes == mode
        off = logs[chosen] - np.median(logs[chosen])
        scores[chosen] = off / max(np.median(np.abs(off)) / 0.6745, MIN_SPREAD)
        nats[chosen] = losses[chosen] - np.median(losses[chosen])
    return scores, nats
