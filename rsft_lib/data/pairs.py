"""What long and short answers of the same problems say to each other, as numbers: one row per sample."""

import numpy as np

from rsft_lib.data.samples import MODE_NAMES

ROW = np.dtype(
    [
        ("mode", "u1"),  # of samples.MODE_NAMES
        ("source", "u1"),  # which of the files that are read it comes from
        ("cut", "?"),  # whether it is a short answer that was cut from a long one
        ("line", "u4"),  # where in its file, counted from 1
        ("question", "u8"),  # hash of the first question of its conversation, by which the split is made
        ("problem", "u8"),  # hash of all that comes before the answer, a system prompt too
        ("claim", "u8"),  # hash of the problem and its final answer; 0 where none is found
        ("wrong", "?"),  # the final answer differs from the record's own field `answer`
        ("prompt", "i4"),  # length, in the unit of the counter
        ("answer", "i4"),
        ("offset", "i8"),  # where the record lies in the scratch file, in bytes
        ("size", "i4"),
    ]
)
THINK, SHORT, OTHER = range(len(MODE_NAMES))
Pairs = tuple[np.ndarray, np.ndarray]  # row numbers, int64, of the same length


def partners(rows: np.ndarray, mine: np.ndarray, others: np.ndarray) -> Pairs:
    """Each row number of `mine` with the first of `others` that has the same problem; without one it is left out."""
    if not len(others):
        return mine[:0], others
    others = others[np.argsort(rows["problem"][others], kind="stable")]
    at = np.searchsorted(rows["problem"][others], rows["problem"][mine]).clip(max=len(others) - 1)
    same = rows["problem"][others[at]] == rows["problem"][mine]
    return mine[same], others[at[same]]


def disagreeing(rows: np.ndarray) -> Pairs:
    """(samples to drop, a counterpart of each whose final answer differs).

    A sample goes when answers of the other mode to its problem are known and none of them is its own. Of a long and
    a short answer that disagree both go, since nothing tells which is right; of four long ones of which one is off,
    that one. A sample that does not give its record's own field `answer` goes too, is no evidence against others,
    and is named as its own counterpart.
    """
    wrong, known = np.flatnonzero(rows["wrong"]), (rows["claim"] != 0) & ~rows["wrong"]
    dropped, against = [wrong], [wrong]
    for mode, other in ((THINK, SHORT), (SHORT, THINK)):
        others = np.flatnonzero(known & (rows["mode"] == other))
        mine, example = partners(rows, np.flatnonzero(known & (rows["mode"] == mode)), others)
        alone = ~np.isin(rows["claim"][mine], rows["claim"][others])
        dropped.append(mine[alone])
        against.append(example[alone])
    return np.concatenate(dropped), np.concatenate(against)


def not_shorter(rows: np.ndarray) -> Pairs:
    """(short samples, the shortest long one of the same problem) where the short one is no shorter."""
    longs = np.flatnonzero(rows["mode"] == THINK)
    shorts = np.flatnonzero(rows["mode"] == SHORT)
    shorts, against = partners(rows, shorts, longs[np.argsort(rows["answer"][longs])])
    worse = rows["answer"][shorts] >= rows["answer"][against]
    return shorts[worse], against[worse]


def coverage(rows: np.ndarray) -> dict[str, int]:
    """Problems by the modes in which they are answered."""
    if (rows["mode"] == OTHER).any():
        return {"other": len(np.unique(rows["problem"]))}
    longs, shorts = (np.unique(rows["problem"][rows["mode"] == mode]) for mode in (THINK, SHORT))
    both = len(np.intersect1d(longs, shorts, assume_unique=True))
    return {"both": both, "think_only": len(longs) - both, "short_only": len(shorts) - both}


def held_back(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows, bool [rows], belong to the share of the questions that is kept from training.

    Some question is held out if the share is above zero, and some is trained.
    """
    questions = np.unique(rows["question"])
    count = min(max(round(share * len(questions)), int(share > 0)), len(questions) - 1)
    return np.isin(rows["question"], np.random.default_rng(seed).permutation(questions)[:count])


def balance(rows: np.ndarray) -> dict[str, dict[str, int]]:
    """Samples, and the summed length of their prompts and answers, by mode."""
    modes = (OTHER,) if (rows["mode"] == OTHER).any() else (THINK, SHORT)
    found = {MODE_NAMES[mode]: rows[rows["mode"] == mode] for mode in modes}
    return {
        mode: {"samples": len(r), **{name: int(r[name].sum(dtype=np.int64)) for name in ("prompt", "answer")}}
        for mode, r in found.items()
    }
