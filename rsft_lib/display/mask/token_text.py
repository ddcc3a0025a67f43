"""The text of token ids in displayable pieces: no grapheme is split, and single tokens show at segment boundaries."""

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.common.visible import visible

EDGE = 6  # tokens at each end of a segment shown one by one
FOLD, SHOWN = 300, 100  # a segment of over FOLD tokens shows SHOWN at each end and folds the rest
LONGEST = 32  # tokens per grapheme; a family emoji takes about 20
UNFINISHED = ("\ufffd", "\u200d")  # an incomplete UTF-8 sequence, a trailing zero-width joiner
CONTINUING = "\ufffd\u200c\u200d\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
BYTES = 4  # of a UTF-8 character, hence its most tokens


class Piece(NamedTuple):
    """Tokens `start` to `end` (exclusive), displayed together."""

    start: int
    end: int
    text: str
    ids: list[int]  # only at segment boundaries and for added tokens, else empty
    boxed: bool  # an added token, such as <think>
    folded: bool


class TokenText:
    """The text of `ids`, int [tokens], by position. Runs are decoded together, so multi-token characters survive."""

    def __init__(self, ids: np.ndarray, tokenizer: PreTrainedTokenizerBase):
        self.ids, self.tokenizer = ids, tokenizer
        added = list(tokenizer.get_added_vocab().values())
        self.added = np.flatnonzero(np.isin(ids, added))  # positions of added tokens

    def between(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.ids[start:end], clean_up_tokenization_spaces=False)

    def token(self, position: int) -> str:
        """A single token, quoted; an incomplete character shows as U+FFFD."""
        return repr(visible(self.between(position, position + 1)))

    def pieces(self, first: int, last: int) -> Iterator[Piece]:
        """The pieces of the segment `first` to `last`, in order and without gaps."""
        added = self.added[np.searchsorted(self.added, first) : np.searchsorted(self.added, last)]
        folds = (first + SHOWN, last - SHOWN) if last - first > FOLD else (last, last)
        edges = (*range(first, first + EDGE), first + EDGE, *range(last - EDGE, last))
        cuts = {cut for cut in (*edges, *added.tolist(), *(added + 1).tolist(), *folds, last) if first < cut <= last}
        boxed, start = set(added.tolist()), first
        for cut in sorted(cuts):
            if cut <= start:
                continue
            end = self.grapheme_end(start, cut, last)
            box = end - start == 1 and start in boxed
            near = box or end <= first + EDGE or start >= last - EDGE
            ids = self.ids[start:end].tolist() if near else []
            yield Piece(start, end, self.between(start, end), ids, box, folds[0] <= start < folds[1])
            start = end

    def grapheme_end(self, start: int, end: int, last: int) -> int:
        """`end`, moved forward to the next grapheme boundary, at most to `last`."""
        for later in range(end, min(end + LONGEST, last)):
            before = self.between(max(start, later - BYTES), later)
            after = self.between(later, min(later + BYTES, last))
            if not before.endswith(UNFINISHED) and not _continues(after):
                return later
        return end if end + LONGEST <= last else last


def _continues(text: str) -> bool:
    """Whether a text continues the preceding grapheme: combining mark, joiner, skin tone, incomplete character."""
    first = text[:1]
    return bool(first) and (first in CONTINUING or unicodedata.category(first).startswith("M"))
