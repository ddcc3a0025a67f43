"""Per-sample statistics of a token store, computed in one pass over tokens and mask."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.data.span_kinds import forced_closes
from rsft_lib.data.store import LENGTHS, MASK, NAME, TokenStore
from rsft_lib.display.mask.segments import DEFAULT_WEIGHTS, Forms, Marks
from rsft_lib.tokenizer.dialect import MODE_NAMES, modes_of

CHUNK = 1 << 24  # tokens per chunk; takes some 150 MB


@dataclass(frozen=True)
class Samples:
    """One entry per sample of a store; int32 [samples] in tokens unless stated otherwise."""

    lengths: np.ndarray  # before truncation
    trained: np.ndarray  # targets in the loss
    first: np.ndarray  # position of the first trained token
    closed: np.ndarray  # tokens up to and including the last </think> of an answer, 0 if there is none
    cut: np.ndarray  # bool: a thinking budget has cut the thoughts, so a </think> is not trained
    ended: np.ndarray  # bool: the last token is EOS
    modes: np.ndarray  # uint8, indices into MODE_NAMES, by the beginning of the first trained answer
    dropped: np.ndarray  # int32 [records]: lengths of records that were too long to be stored

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def present(self) -> list[str]:
        """The modes that occur."""
        return [mode for mode in MODE_NAMES if self.of(mode).any()]

    def of(self, mode: str) -> np.ndarray:
        """Which samples are in `mode`, bool [samples]."""
        return self.modes == MODE_NAMES.index(mode)


def measure(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> Samples:
    """Read a whole store once, at some 200 million tokens per second.

    Raises:
        ValueError: all or none of a sample's targets are trained.
    """
    marks, forms = Marks.of(tokenizer), Forms.of(tokenizer, store.dialect)
    parts = [_measure(*chunk, marks, forms) for chunk in _chunks(store)]
    trained, first, closed, cut, ended, modes = (np.concatenate(column) for column in zip(*parts, strict=True))
    wrong = np.flatnonzero((trained == 0) | (trained == store.lengths - 1))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"{store.folder}: in {len(wrong):,} samples all or none of the targets are trained, first in sample {i} "
            f"with {trained[i]} of {store.lengths[i] - 1}: the mask is wrong; check the chat template (notebook 01)"
        )
    lengths, dropped = _rendered(store)
    return Samples(lengths, trained, first, closed, cut, ended, modes, dropped)


def _chunks(store: TokenStore) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Chunks of samples: tokens int32 [tokens], trained bool [tokens], sample starts int64 [samples]."""
    tokens = np.memmap(store.folder / f"{NAME}.bin", dtype=np.int32, mode="r")
    mask = np.memmap(store.folder / MASK, dtype=np.uint8, mode="r")
    in_loss = np.asarray(getattr(store, "weights", DEFAULT_WEIGHTS)) != 0
    begins = store.ends - store.lengths
    for first, last in store.chunks(CHUNK):
        start, end = begins[first], store.ends[last - 1]
        yield tokens[start:end], in_loss[mask[start:end]], begins[first:last] - start


def _measure(
    tokens: np.ndarray, trained: np.ndarray, begins: np.ndarray, marks: Marks, forms: Forms
) -> tuple[np.ndarray, ...]:
    """The columns `trained` to `modes` of the samples that begin at `begins`, int64 [samples]."""
    trained[begins] = False  # no position predicts a first token
    ends = np.append(begins[1:], len(tokens))
    counts = np.add.reduceat(trained, begins, dtype=np.int32)
    starts = np.append(np.flatnonzero(trained[1:] & ~trained[:-1]) + 1, len(tokens) - 1)
    first = starts[np.searchsorted(starts, begins)]
    modes = modes_of(tokens, first, forms.openings)
    forced = forced_closes(tokens, trained, marks.end_think)
    closings = np.append(-1, np.flatnonzero(forced | (tokens == marks.end_think) & trained))
    last = closings[np.searchsorted(closings, ends) - 1]
    closed = np.where(last >= begins, last - begins + 1, 0)
    cut, ended = np.logical_or.reduceat(forced, begins), tokens[ends - 1] == marks.eos
    return counts, (first - begins).astype(np.int32), closed.astype(np.int32), cut, ended, modes


def _rendered(store: TokenStore) -> tuple[np.ndarray, np.ndarray]:
    """(lengths of the stored samples before truncation, lengths of the dropped records)."""
    path = store.folder / LENGTHS
    lengths = np.load(path) if path.is_file() else store.lengths
    if len(lengths) == len(store):
        return lengths, lengths[:0]
    dropped = lengths > store.lengths.max()  # too long to be stored: longer than every stored sample
    if len(lengths) - dropped.sum() != len(store):
        raise ValueError(f"{path} has {len(lengths)} lengths, which do not match {len(store)} samples: tokenize again")
    return store.lengths, lengths[dropped]
