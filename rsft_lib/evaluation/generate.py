"""Answers of an exported model in a forced mode, or the mode it chooses, and their scores."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rsft_lib.common.paths import require_path
from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.evaluation.inference_engines import BATCH, Sampling, open_engine
from rsft_lib.evaluation.questions import Question
from rsft_lib.tokenizer.chat import END_THINK, MODES, SHORT, THINK, prompt_ids
from rsft_lib.tokenizer.patch import load_tokenizer

MARKS = re.compile("|".join((THINK, END_THINK, SHORT)))
ASKED = (*MODES, None, "other")  # modes of `generate_modes`


@dataclass(frozen=True)
class Answer:
    """An answer: its text from the control token on, its length in tokens, and whether it ended with EOS."""

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
    """Greedy answers of the model in folder `model`; each prompt is a user message or a conversation.

    Args:
        mode: 'think' or 'short' forces the control token; None lets the model choose.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such mode.
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
        modes: 'think', 'short', None to let the model choose, or 'other' for a model without modes.
        engine: see `inference_engines.open_engine`.

    Raises:
        ValueError: there is no such mode or engine.
    """
    if unknown := [mode for mode in modes if mode not in ASKED]:
        raise ValueError(f"mode is {unknown[0]!r}; choose one of {', '.join(map(repr, ASKED))}")
    folder = require_path(model, "exported model")
    tokenizer, write = load_tokenizer(folder), open_engine(folder, engine, batch_size)
    answers = {}
    for mode in modes:
        ids = [_prompt_ids(tokenizer, prompt, mode) for prompt in prompts]
        forced = int(mode in MODES)  # control tokens at the end of the prompt, part of the answer
        written = write(ids, sampling)
        answers[mode] = [
            _answer(tokenizer, prompt[len(prompt) - forced :] + more) for prompt, more in zip(ids, written, strict=True)
        ]
    return answers


def _prompt_ids(tokenizer, prompt: str | Question, mode: str | None) -> list[int]:
    question = Question([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
    return prompt_ids(tokenizer, question.messages, mode if mode in MODES else None, question.tools)


def _answer(tokenizer, ids: list[int]) -> Answer:
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    ids = ids[:-1] if ended else ids
    return Answer(tokenizer.decode(ids), len(ids), ended)


def chosen_mode(answer: Answer) -> str:
    """The mode that an answer begins with: 'think', 'short', or 'neither'."""
    return next((mode for mode, token in MODES.items() if answer.text.startswith(token)), "neither")


def well_formed(answer: Answer, mode: str) -> bool:
    """Whether an answer has the format of its mode and ends with EOS.

    think: `<think>` chain of thought `</think>` answer; short: `<short>` answer; other: an answer without control
    tokens.
    """
    if mode == "other":
        return answer.ended and bool(answer.text.strip()) and not MARKS.search(answer.text)
    expected = [THINK, END_THINK] if mode == "think" else [SHORT]
    *_, rest = answer.text.rpartition(expected[-1])
    begins = answer.text.startswith(expected[0])
    return answer.ended and begins and MARKS.findall(answer.text) == expected and bool(rest.strip())


def is_correct(answer: Answer, expected: str) -> bool:
    """Whether the final answer, after any chain of thought, matches; numbers are compared by value."""
    if answer.text.startswith(THINK) and END_THINK not in answer.text:
        return False  # the chain of thought was cut off
    final = final_answer(answer.text)
    return final is not None and normalized(final) == normalized(final_answer(expected) or expected)


def score(answers: list[Answer], expected: list[str], mode: str | None) -> dict[str, float]:
    """Accuracy, share of well-formed answers (both in [0, 1]), and mean length in tokens.

    Args:
        mode: the mode of all answers; None for the one that each chose.
    """
    n = len(answers)
    correct = sum(is_correct(a, e) for a, e in zip(answers, expected, strict=True))
    return {
        "accuracy": correct / n,
        "well_formed": sum(well_formed(a, mode or chosen_mode(a)) for a in answers) / n,
        "tokens": sum(a.tokens for a in answers) / n,
    }
