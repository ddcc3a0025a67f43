"""Match the long and short answers to the same problems: what is inconsistent, what is held out, how modes balance."""

import numpy as np

from rsft_lib.tokenizer.dialect import MODE_NAMES

ROW = np.dtype(
    [
        ("mode", "u1"),  # index into MODE_NAMES
        ("source", "u1"),  # index of the input
        ("cut", "?"),  # a short answer that was cut from a long one
        ("line", "u4"),  # record number in its input, counted from 1
        ("question", "u8"),  # hash of the conversation's first question, the unit of the split
        ("problem", "u8"),  # hash of everything before the answer, including a system prompt
        ("claim", "u8"),  # hash of problem and final answer; 0 if there is none
        ("wrong", "?"),  # the final answer differs from the record's field `answer`
        ("given", "?"),  # its mode is given, not chosen: the control token is not trained
        ("difficulty", "f4"),  # the record's field `difficulty`; NaN without
        ("prompt", "i4"),  # lengths in tokens or characters
        ("answer", "i4"),
        ("offset", "i8"),  # position and size in the scratch file, in bytes
        ("size", "i4"),
    ]
)
THINK, SHORT, OTHER = range(len(MODE_NAMES))
Pairs = tuple[np.ndarray, np.ndarray]  # row numbers, int64, of the same length


def partners(rows: np.ndarray, mine: np.ndarray, others: np.ndarray) -> Pairs:
    """Pair each row number of `mine` with the first of `others` that has the same problem; drop those without one."""
    if not len(others):
        return mine[:0], others
    others = others[np.argsort(rows["problem"][others], kind="stable")]
    at = np.searchsorted(rows["problem"][others], rows["problem"][mine]).clip(max=len(others) - 1)
    same = rows["problem"][others[at]] == rows["problem"][mine]
    return mine[same], others[at[same]]


def disagreeing(rows: np.ndarray) -> Pairs:
    """(samples to drop, for each a counterpart with a different final answer).

    A sample is dropped if there are final answers of the other mode to its problem and none equals its own. If one long
    and one short answer disagree, both are dropped, since either may be wrong; if only one of several long answers
    disagrees, only that one is. A sample that contradicts its record's field `answer` is dropped too, is not used
    against others, and is its own counterpart.
    """
    wrong, known = np.flatnonzero(rows["wrong"]), (rows["claim"] != 0) & ~rows["wrong"]
    dropped, against = [wrong], [wrong]
    for mode, other in ((THINK, SHORT), (SHORT, THINK)):
        others = np.flatnonzero(known & (rows["mode"] == other))
        mine, example = partners(rows, np.flatnonzero(known & (rows["mode"] == mode)), others)
        unsupported = ~np.isin(rows["claim"][mine], rows["claim"][others])
        dropped.append(mine[unsupported])
        against.append(example[unsupported])
    return np.concatenate(dropped), np.concatenate(against)


def not_shorter(rows: np.ndarray) -> Pairs:
    """(short samples, the shortest long one of the same problem) where the short one is not shorter."""
    longs = np.flatnonzero(rows["mode"] == THINK)
    shorts = np.flatnonzero(rows["mode"] == SHORT)
    shorts, against = partners(rows, shorts, longs[np.argsort(rows["answer"][longs])])
    worse = rows["answer"][shorts] >= rows["answer"][against]
    return shorts[worse], against[worse]


def unneeded(rows: np.ndarray, short_up_to: float) -> np.ndarray:
    """The samples, int64, in a mode that their problem does not need.

    A problem with answers in both modes needs the short one if it is known to be right (`disagreeing` has left it, and
    it has a final answer), and, with `short_up_to`, if its difficulty is at most that; else the long one. An answer cut
    from a long one is right, but no sign that the problem needs no thoughts: it takes a difficulty.
    """
    easy = rows["difficulty"] <= short_up_to if short_up_to else ~rows["cut"]
    sure = np.unique(rows["problem"][(rows["mode"] == SHORT) & (rows["claim"] != 0) & easy])
    long, short = (np.unique(rows["problem"][rows["mode"] == mode]) for mode in (THINK, SHORT))
    both = np.isin(rows["problem"], np.intersect1d(long, short, assume_unique=True))
    needed = np.where(np.isin(rows["problem"], sure), SHORT, THINK)
    return np.flatnonzero(both & (rows["mode"] != needed))


def coverage(rows: np.ndarray) -> dict[str, int]:
    """The number of problems by the modes of their answers."""
    if (rows["mode"] == OTHER).any():
        return {"other": len(np.unique(rows["problem"]))}
    longs, shorts = (np.unique(rows["problem"][rows["mode"] == mode]) for mode in (THINK, SHORT))
    both = len(np.intersect1d(longs, shorts, assume_unique=True))
    return {"both": both, "think_only": len(longs) - both, "short_only": len(shorts) - both}


def held_back(rows: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which rows, bool [rows], are in the held-out set: those of a random `share` of the questions.

    At least one question is held out if `share` > 0, and at least one is trained.
    """
    questions = np.unique(rows["question"])
    count = min(max(round(share * len(questions)), int(share > 0)), len(questions) - 1)
    return np.isin(rows["question"], np.random.default_rng(seed).permutation(questions)[:count])


def balance(rows: np.ndarray) -> dict[str, dict[str, int]]:
    """The number of samples and the total lengths of their prompts and answers, by mode."""
    modes = (OTHER,) if (rows["mode"] == OTHER).any() else (THINK, SHORT)
    by_mode = {MODE_NAMES[mode]: rows[rows["mode"] == mode] for mode in modes}
    return {
        mode: {
            "samples": len(r),
            "choices": int((~r["given"]).sum()),
            **{name: int(r[name].sum(dtype=np.int64)) for name in ("prompt", "answer")},
        }
        for mode, r in by_mode.items()
    }
