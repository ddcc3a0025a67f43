"""The segments of a tokenized sample (context, chain of thought, answer, EOS), and warnings about its structure."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from rsft_lib.tokenizer.chat import END_THINK, SHORT, THINK

CONTEXT, THOUGHT, ANSWER, SHORT_ANSWER, END = "context", "think", "answer", "short", "EOS"
DEFAULT_WEIGHTS = (0.0, 1.0)  # loss weight by mask byte, unless the store defines others


class Marks(NamedTuple):
    """Ids of the tokens that structure a sample; -1 if the tokenizer lacks one."""

    think: int
    end_think: int
    short: int
    eos: int

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        vocabulary = tokenizer.get_added_vocab()
        think, end_think, short = (vocabulary.get(token, -1) for token in (THINK, END_THINK, SHORT))
        return cls(think, end_think, short, -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `end` (exclusive) of one kind; `weight` multiplies their loss, 0 if untrained."""

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
    """Partition a sample into segments, in order and without gaps.

        text     <bos> <｜User｜> 2 + 2 ? <｜Assistant｜> <think> hm </think> 4 <eos>
        weight     0      0     0 0 0 0       0           1    1     1    1   1
        kind     context -----------------------------  think ----------- answer EOS

    Args:
        ids: int [tokens].
        weights: float [tokens], the weight of each token as a target; 0 if untrained.
    """
    marked = np.flatnonzero(np.isin(ids, marks))  # each starts and ends a slice below
    changed = np.flatnonzero(np.diff(weights)) + 1
    cuts = np.unique(np.concatenate([[0], changed, marked, marked + 1, [len(ids)]]))
    parts: list[Segment] = []
    state = ANSWER
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        weight, token = float(weights[start]), int(ids[start])
        if not weight:
            kind = state = CONTEXT
        else:
            state = {marks.think: THOUGHT, marks.short: SHORT_ANSWER}.get(token, state)
            state = ANSWER if state == CONTEXT else state
            kind = END if token == marks.eos else state
        if parts and (parts[-1].kind, parts[-1].weight) == (kind, weight):
            parts[-1] = Segment(kind, parts[-1].start, end, weight)
        else:
            parts.append(Segment(kind, start, end, weight))
        if token in (marks.end_think, marks.eos):
            state = ANSWER
    return parts


def remarks(ids: np.ndarray, parts: list[Segment], marks: Marks) -> list[str]:
    """Warnings about malformed answers and missing EOS; empty for a well-formed sample."""
    warnings = []
    for start, end in _answers(parts):
        tags = [token for token in ids[start:end].tolist() if token in marks[:3]]
        if tags not in ([marks.think, marks.end_think], [marks.short], []):
            names = dict(zip(marks, (THINK, END_THINK, SHORT), strict=False))
            have = " ".join(names[tag] for tag in tags)
            warnings.append(f"the answer at {start:,} contains {have}; expected {THINK} {END_THINK} or {SHORT}, once")
        if tags[:2] == [marks.think, marks.end_think]:
            opened, closed = (start + ids[start:end].tolist().index(tag) for tag in tags[:2])
            if closed - opened <= 2:  # at most a line break
                warnings.append(f"empty chain of thought at {opened:,}")
        if end < len(ids) and ids[end] == marks.eos:
            warnings.append(f"EOS at {end:,} ends an answer but is not trained")
    if ids[-1] != marks.eos:
        warnings.append("it does not end with EOS: it was truncated, or the template writes none")
    return warnings


def _answers(parts: list[Segment]) -> list[tuple[int, int]]:
    """(start, end) of each contiguous span of trained tokens."""
    spans = (list(group) for trained, group in groupby(parts, lambda s: s.trained) if trained)
    return [(span[0].start, span[-1].end) for span in spans]
