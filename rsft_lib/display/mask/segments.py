"""The segments of a tokenized sample (context, chain of thought, answer, EOS), and warnings about its structure."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from rsft_lib.data.span_kinds import forced_closes
from rsft_lib.tokenizer.dialect import (
    END_THINK,
    MODE_NAMES,
    SHORT,
    THINK,
    THINKLESS,
    Dialect,
    Opening,
    modes_of,
    openings_of,
)

CONTEXT, THOUGHT, ANSWER, SHORT_ANSWER, END = "context", "think", "answer", "short", "EOS"
FORCED = "forced close"  # the </think> of a thinking budget
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


@dataclass(frozen=True)
class Forms:
    """The forms that answers may have: those of a dialect, in the tokens of a tokenizer."""

    dialect: Dialect
    openings: tuple[Opening, ...]

    @classmethod
    def of(cls, tokenizer, dialect: Dialect = THINKLESS) -> "Forms":
        return cls(dialect, openings_of(tokenizer, dialect))

    def mode_at(self, ids: np.ndarray, first: int) -> str:
        """The mode of the answer whose first trained token is at `first`."""
        return MODE_NAMES[modes_of(ids, np.array([first]), self.openings)[0]]

    def short_from(self, ids: np.ndarray, first: int) -> int | None:
        """Where a short answer at `first` goes on after its opening; None for another answer."""
        opening = self.openings[MODE_NAMES.index("short")]
        if self.mode_at(ids, first) != "short":
            return None
        begins = first + opening.offset
        written = begins >= 0 and ids[begins : begins + len(opening.ids)].tolist() == list(opening.ids)
        return max(first, begins + len(opening.ids)) if written else first  # else the prompt ends with the opening

    @property
    def tags(self) -> list[list[str]]:
        """The tags that the trained part of an answer may have, in order."""
        return [[], *map(self.dialect.tags_of, self.dialect.forms)]


def segments(ids: np.ndarray, weights: np.ndarray, marks: Marks, forms: Forms) -> list[Segment]:
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
    begins = np.flatnonzero(np.diff(weights != 0, prepend=False) & (weights != 0)).tolist()
    short = {forms.short_from(ids, first) for first in begins}
    forced = set(np.flatnonzero(forced_closes(ids, weights != 0, marks.end_think)).tolist())
    cuts = np.unique(np.concatenate([[0], changed, marked, marked + 1, [len(ids)]]))
    parts: list[Segment] = []
    state = ANSWER
    for start, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        weight, token = float(weights[start]), int(ids[start])
        if start in forced:
            kind = FORCED
        elif not weight:
            kind = state = CONTEXT
        else:
            state = SHORT_ANSWER if start in short else state  # after an empty think block
            state = {marks.think: THOUGHT, marks.short: SHORT_ANSWER}.get(token, state)
            if state == CONTEXT:  # after the control token, if the mode was given
                state = {marks.think: THOUGHT, marks.short: SHORT_ANSWER}.get(int(ids[start - 1]), ANSWER)
            kind = END if token == marks.eos else state
        if parts and (parts[-1].kind, parts[-1].weight) == (kind, weight):
            parts[-1] = Segment(kind, parts[-1].start, end, weight)
        else:
            parts.append(Segment(kind, start, end, weight))
        if token in (marks.end_think, marks.eos):
            state = ANSWER
    return parts


def remarks(ids: np.ndarray, parts: list[Segment], marks: Marks, forms: Forms) -> list[str]:
    """Warnings about malformed answers and missing EOS; empty for a well-formed sample."""
    warnings = []
    for start, end in _answers(parts):
        names = dict(zip(marks, (THINK, END_THINK, SHORT), strict=False))
        begin = start - (start > 0 and int(ids[start - 1]) in (marks.think, marks.short))  # the mode was given
        tags = [names[token] for token in ids[begin:end].tolist() if token in marks[:3]]
        if tags not in forms.tags:
            expected = " or ".join(dict.fromkeys(" ".join(tags) for tags in forms.tags[1:]))
            warnings.append(f"the answer at {start:,} contains {' '.join(tags)}; expected {expected}, once")
        forced = any(part.kind == FORCED and start <= part.start < end for part in parts)
        if tags[:2] == [THINK, END_THINK] and not forced and forms.mode_at(ids, start) != forms.dialect.empty_block:
            opened, closed = (begin + ids[begin:end].tolist().index(token) for token in marks[:2])
            if closed - opened <= 2:  # at most a line break
                warnings.append(f"empty chain of thought at {opened:,}")
        if end < len(ids) and ids[end] == marks.eos:
            warnings.append(f"EOS at {end:,} ends an answer but is not trained")
    if ids[-1] != marks.eos:
        warnings.append("it does not end with EOS: it was truncated, or the template writes none")
    return warnings


def _answers(parts: list[Segment]) -> list[tuple[int, int]]:
    """(start, end) of each contiguous span of trained tokens and the forced close in it."""
    spans = (list(group) for inside, group in groupby(parts, lambda s: s.trained or s.kind == FORCED) if inside)
    return [(span[0].start, span[-1].end) for span in spans]
