"""Classify trained tokens by the mode of their answer and their span in it.

trained    <think> first 2 + 2 ... </think> So 4 . <eos>        <short> 4 . <eos>
mode       think ......................................        short ...........
span       control think ........... think  answer .. eos       control answer eos

The control token is the one that decides between the modes: of Qwen3's dialect, in which all answers may begin with
<think>, it is the line break after it, one for thoughts or two for none.
"""

from typing import NamedTuple

import numpy as np

from rsft_lib.data.store import TokenStore
from rsft_lib.tokenizer.dialect import END_THINK, MODE_NAMES, MODES, THINK, Opening, modes_of

SPAN_NAMES = ("control", "think", "answer", "eos")
KINDS = len(MODE_NAMES) * len(SPAN_NAMES)  # a kind is mode * len(SPAN_NAMES) + span


class Control(NamedTuple):
    """Ids of the tokens that delimit modes and spans."""

    modes: tuple[int, ...]
    """The control token of each mode, in the order of `MODES`; empty if no single token decides."""
    end_think: int
    eos: int
    think: int
    openings: tuple[Opening, ...]
    """The tokens by which the mode of an answer is known, in the order of `MODES`."""
    at: int = 0
    """The position of the control token in an answer."""


def control_tokens(store: TokenStore) -> Control | None:
    """The ids of the tokenizer with which a store was written; None if it lacks one of the tokens."""
    manifest, ids = store.manifest, store.manifest.get("control_ids", {})
    if manifest.get("eos_id") is None or any(tag not in ids for tag in store.dialect.tags):
        return None
    alone = [ids.get(tag) for tag in MODES.values()]  # the control tokens of Thinkless, for stores of earlier versions
    at, *modes = manifest.get("choice", (0, *alone)) or (0,)
    found = manifest.get("openings", {mode: ([token], 0) for mode, token in zip(MODES, alone, strict=True)})
    openings = tuple(Opening(tuple(tokens), offset) for tokens, offset in found.values())
    return Control(tuple(modes), ids[END_THINK], manifest["eos_id"], ids[THINK], openings, at)


def kinds(labels: np.ndarray, trained: np.ndarray, control: Control) -> np.ndarray:
    """The kind of each label of one sample.

    Args:
        labels: int [n]; trained: bool [n]. A run of trained labels is an answer, and goes on after an untrained
            `</think>` in it, with which a thinking budget has cut the thoughts.

    Returns:
        uint8 [n]; undefined (0) where not trained.
    """
    result = np.zeros(len(labels), dtype=np.uint8)
    answers = trained | forced_closes(labels, trained, control.end_think)
    edges = np.flatnonzero(np.diff(answers.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    modes = modes_of(labels, edges[:, 0], control.openings)
    for (first, end), mode in zip(edges.tolist(), modes.tolist(), strict=True):
        result[first:end] = mode * len(SPAN_NAMES) + _spans(labels[first:end], mode, control)
    return np.where(trained, result, 0)


def forced_closes(tokens: np.ndarray, trained: np.ndarray, end_think: int) -> np.ndarray:
    """Which tokens, bool [n], are an untrained `</think>` between trained ones, where a budget has cut the thoughts."""
    around = np.pad(trained, 1)
    return (tokens == end_think) & ~trained & around[:-2] & around[2:]


def _spans(labels: np.ndarray, mode: int, control: Control) -> np.ndarray:
    """The span of each label of one answer."""
    chosen = mode < len(MODES) and control.openings[mode].offset == 0  # else the prompt decides, or nothing
    spans = np.full(len(labels), SPAN_NAMES.index("answer"))
    if labels[0] == control.think or mode == MODE_NAMES.index("think"):
        ends = np.flatnonzero(labels == control.end_think)
        spans[: ends[0] + 1 if len(ends) else len(labels)] = SPAN_NAMES.index("think")
    if chosen and len(labels) > control.at and int(labels[control.at]) in control.modes:
        spans[control.at] = SPAN_NAMES.index("control")
    spans[labels == control.eos] = SPAN_NAMES.index("eos")
    return spans
