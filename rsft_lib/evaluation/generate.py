"""Answers from an exported model in either mode, or in the one it chooses, and how good they are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsft_lib.common.paths import existing
from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.evaluation.engines import BATCH, Sampling, open_engine
from rsft_lib.evaluation.questions import Question
from rsft_lib.tokenizer.chat import END_THINK, MODES, SHORT, THINK, prompt_ids
from rsft_lib.tokenizer.patch import load_tokenizer

MARKS = re.compile("|".join((THINK, END_THINK, SHORT)))


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text from the control token on, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def generate(
    model: str | Path,
    prompts: Sequence[str | Question],
    mode: str | None,
    max_new_tokens: int = 256,
    batch_size: int = BATCH,
) -> list[Answer]:
    """Greedy answers of the model in folder `model` to one user message, or conversation, each.

    Args:
        mode: 'think' or 'short' puts the control token before the answer; None lets the model choose.
    """
    return generate_modes(model, prompts, [mode], Sampling(max_new_tokens), batch_size=batch_size)[mode]


def generate_modes(
    model: str | Path,
    prompts: Sequence[str | Question],
    modes: Sequence[str | None],
    sampling: Sampling,
    engine: str = "auto",
    batch_size: int = BATCH,
) -> dict[str | None, list[Answer]]:
    """The answers in each of several modes, with the model loaded once.

    Args:
        modes: of 'think', 'short' and None, which lets the model choose; 'other' for one that knows no modes.
        engine: see `engines.open_engine`.
    """
    folder = existing(model, "exported model")
    tokenizer, write = load_tokenizer(folder), open_engine(folder, engine, batch_size)
    answers = {}
    for mode in modes:
        ids = [_prompt_ids(tokenizer, prompt, mode) for prompt in prompts]
        forced = int(mode in MODES)  # tokens at the end of every prompt that belong to the answer
        written = write(ids, sampling)
        answers[mode] = [
            _answer(tokenizer, prompt[len(prompt) - forced :] + more) for prompt, more in zip(ids, written, strict=True)
        ]
    return answers


def _prompt_ids(tokenizer, prompt: str | Question, mode: str | None) -> list[int]:
    asked = Question([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
    return prompt_ids(tokenizer, asked.messages, mode if mode in MODES else None, asked.tools)


def _answer(tokenizer, ids: list[int]) -> Answer:
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    ids = ids[:-1] if ended else ids
    return Answer(tokenizer.decode(ids), len(ids), ended)


def chosen_mode(answer: Answer) -> str:
    """The mode that an answer began with: 'think', 'short', or 'neither'."""
    return next((mode for mode, token in MODES.items() if answer.text.startswith(token)), "neither")


def well_formed(answer: Answer, mode: str) -> bool:
    """Whether an answer keeps to its mode and ends.

    think: `<think>` thoughts `</think>` answer; short: `<short>` answer, with no thoughts; other: an answer without
    control tokens, of a model that knows no modes.
    """
    if mode == "other":
        return answer.ended and bool(answer.text.strip()) and not MARKS.search(answer.text)
    expected = [THINK, END_THINK] if mode == "think" else [SHORT]
    *_, rest = answer.text.rpartition(expected[-1])
    begins = answer.text.startswith(expected[0])
    return answer.ended and begins and MARKS.findall(answer.text) == expected and bool(rest.strip())


def is_right(answer: Answer, expected: str) -> bool:
    """Whether the final answer, after any thoughts, is the expected one; numbers are compared as numbers."""
    if answer.text.startswith(THINK) and END_THINK not in answer.text:
        return False  # it was still thinking
    said = final_answer(answer.text)
    return said is not None and normalized(said) == normalized(final_answer(expected) or expected)


def score(answers: list[Answer], expected: list[str], mode: str | None) -> dict[str, float]:
    """Shares of right and of well-formed answers, from 0 to 1, and their mean length in tokens.

    Args:
        mode: that of all answers; None for the one that each has chosen.
    """
    n = len(answers)
    right = sum(is_right(a, e) for a, e in zip(answers, expected, strict=True))
    return {
        "accuracy": right / n,
        "well_formed": sum(well_formed(a, mode or chosen_mode(a)) for a in answers) / n,
        "tokens": sum(a.tokens for a in answers) / n,
    }
