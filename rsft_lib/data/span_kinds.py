"""Classify trained tokens by the mode of their answer and their span in it.

trained    <think> first 2 + 2 ... </think> So 4 . <eos>        <short> 4 . <eos>
mode       think ......................................        short ...........
span       control think ........... think  answer .. eos       control answer eos
"""

from typing import NamedTuple

import numpy as np

from rsft_lib.data.store import TokenStore
from rsft_lib.tokenizer.chat import END_THINK, MODE_NAMES, MODES, modes_of

SPAN_NAMES = ("control", "think", "answer", "eos")
KINDS = len(MODE_NAMES) * len(SPAN_NAMES)  # a kind is mode * len(SPAN_NAMES) + span


class Control(NamedTuple):
    """Ids of the tokens that delimit modes and spans."""

    modes: tuple[int, ...]
    """The control token of each mode, in the order of `MODES`."""
    end_think: int
    eos: int


def control_tokens(store: TokenStore) -> Control | None:
    """The ids of the tokenizer with which a store was written; None if it lacks one of the tokens."""
    ids, eos = store.manifest.get("control_ids", {}), store.manifest.get("eos_id")
    if eos is None or any(token not in ids for token in (*MODES.values(), END_THINK)):
        return None
    return Control(tuple(ids[token] for token in MODES.values()), ids[END_THINK], eos)


def kinds(labels: np.ndarray, trained: np.ndarray, control: Control) -> np.ndarray:
    """The kind of each label of one sample.

    Args:
        labels: int [n]; trained: bool [n]. A run of trained labels is an answer.

    Returns:
        uint8 [n]; undefined (0) where not trained.
    """
    result = np.zeros(len(labels), dtype=np.uint8)
    edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=0, append=0))
    for first, end in edges.reshape(-1, 2):
        result[first:end] = _answer_kinds(labels[first:end], control)
    return result


def _answer_kinds(labels: np.ndarray, control: Control) -> np.ndarray:
    mode = int(modes_of(labels[:1], control.modes)[0])
    spans = np.full(len(labels), SPAN_NAMES.index("answer"))
    if mode < len(control.modes):
        if MODE_NAMES[mode] == "think":
            ends = np.flatnonzero(labels == control.end_think)
            spans[: ends[0] + 1 if len(ends) else len(labels)] = SPAN_NAMES.index("think")
        spans[0] = SPAN_NAMES.index("control")
    spans[labels == control.eos] = SPAN_NAMES.index("eos")
    return mode * len(SPAN_NAMES) + spans
