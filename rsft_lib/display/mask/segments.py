"""What a tokenized sample consists of: context, thoughts, answer and end, and what is odd about it."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from rsft_lib.tokenizer.chat import END_THINK, SHORT, THINK

CONTEXT, THOUGHT, ANSWER, SHORT_ANSWER, END = "context", "think", "answer", "short", "EOS"
DEFAULT_WEIGHTS = (0.0, 1.0)  # what the bytes of a mask stand for, unless its store says


class Marks(NamedTuple):
    """Ids of the tokens that structure a sample; -1 for those that the tokenizer does not have."""

    think: int
    end_think: int
    short: int
    eos: int

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        vocabulary = tokenizer.get_added_vocab()
        ids = (vocabulary.get(token, -1) for token in (THINK, END_THINK, SHORT))
        return cls(*ids, -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` (exclusive) of one kind; `weight` multiplies their loss, 0 where they are not trained."""

    kind: str
    start: int
    end: int
    weight: float

    @property
    def trained(self) -> bool:
        return self.weight != 0

    def __len__(self) -> int:
        return self.end - self.start


def segments(ids: np.ndarray, weights: np.ndarray, marks: Marks) -> list[Segment]:
    """The sample in order, without gaps.

        text     <bos> <｜User｜> 2 + 2 ? <｜Assistant｜> <think> hm </think> 4 <eos>
        weight     0      0     0 0 0 0       0           1    1     1    1   1
        kind     context -----------------------------  think ----------- answer EOS

    Args:
        ids: int [tokens].
        weights: float [tokens], the weight of each token as a target; 0 where it is not trained.
    """
    marked = np.flatnonzero(np.isin(ids, marks))  # each is a piece of its own below
    changed = np.flatnonzero(np.diff(weights)) + 1
    cuts = np.unique(np.concatenate([[0], changed, marked, marked + 1, [len(ids)]]))
    found: list[Segment] = []
    state = ANSWER
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        weight, token = float(weights[start]), int(ids[start])
        if not weight:
            kind = state = CONTEXT
        else:
            state = {marks.think: THOUGHT, marks.short: SHORT_ANSWER}.get(token, state)
            state = ANSWER if state == CONTEXT else state
            kind = END if token == marks.eos else state
        if found and (found[-1].kind, found[-1].weight) == (kind, weight):
            found[-1] = Segment(kind, found[-1].start, end, weight)
        else:
            found.append(Segment(kind, start, end, weight))
        if token in (marks.end_think, marks.eos):
            state = ANSWER
    return found


def mode(found: list[Segment]) -> str:
    """`think`, `short` or `other`, by the first thing that is trained."""
    first = next(segment.kind for segment in found if segment.trained)
    return first if first in (THOUGHT, SHORT_ANSWER) else "other"


def remarks(ids: np.ndarray, found: list[Segment], marks: Marks) -> list[str]:
    """What is odd about a sample, in words; nothing for one that is as it should be."""
    said = []
    for start, end in _answers(found):
        tags = [token for token in ids[start:end].tolist() if token in marks[:3]]
        if tags not in ([marks.think, marks.end_think], [marks.short], []):
            names = dict(zip(marks, (THINK, END_THINK, SHORT), strict=False))
            have = " ".join(names[tag] for tag in tags)
            said.append(f"the answer at {start:,} has {have}; expected {THINK} {END_THINK} or {SHORT}, once")
        if tags[:2] == [marks.think, marks.end_think]:
            opened, closed = (start + ids[start:end].tolist().index(tag) for tag in tags[:2])
            if closed - opened <= 2:  # at most a line break
                said.append(f"{THINK} at {opened:,} holds no thoughts")
        if end < len(ids) and ids[end] == marks.eos:
            said.append(f"EOS at {end:,} ends an answer but is not trained")
    if ids[-1] != marks.eos:
        said.append("it does not end with EOS: it was cut, or the template writes none")
    return said


def _answers(found: list[Segment]) -> list[tuple[int, int]]:
    """(start, end) of every stretch of trained tokens."""
    stretches = (list(group) for trained, group in groupby(found, lambda s: s.trained) if trained)
    return [(stretch[0].start, stretch[-1].end) for stretch in stretches]
