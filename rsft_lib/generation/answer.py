"""An answer of a model: its mode, its format, whether it ends in a loop, whether it is correct."""

from collections.abc import Sequence
from dataclasses import dataclass

from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.tokenizer.dialect import END_THINK, TAGS, THINK, THINKLESS, Dialect

LOOP, LOOPED = 4, 64  # times that a passage is repeated, and characters that it then covers, in a loop
LONGEST = 2000  # characters of a passage


@dataclass(frozen=True)
class Answer:
    """An answer: its text from the control token or think block on, even where the prompt gave that.

    `tokens` is its length, `ended` whether it ended with EOS, `dialect` how it shows its mode.
    """

    text: str
    tokens: int
    ended: bool
    dialect: Dialect = THINKLESS


def chosen_mode(answer: Answer) -> str:
    """The mode that an answer begins with: 'think', 'short', or 'neither'.

    In Qwen3's dialect an empty think block, whatever its white space, is 'short', and one with thoughts is 'think'.
    """
    mode = answer.dialect.mode_of(answer.text)
    return "neither" if mode == "other" else mode


def obeyed(answers: Sequence[Answer], mode: str) -> float:
    """The share of answers that are in the mode that was asked for, in [0, 1]."""
    return sum(chosen_mode(answer) == mode for answer in answers) / len(answers)


def well_formed(answer: Answer, mode: str | None) -> bool:
    """Whether an answer has the format of a mode (`tokenizer.dialect`) and ends with EOS.

    It has the tags of that mode once and text after them; other: it has no tags.

    Args:
        mode: None for the mode that the answer chose.
    """
    mode = mode or chosen_mode(answer)
    if mode == "other":
        return answer.ended and bool(answer.text.strip()) and not TAGS.search(answer.text)
    if not answer.ended or chosen_mode(answer) != mode or mode not in answer.dialect.forms:
        return False
    expected = answer.dialect.tags_of(mode)
    return TAGS.findall(answer.text) == expected and bool(answer.text.rpartition(expected[-1])[2].strip())


def loops(answer: Answer) -> bool:
    """Whether an answer ends in a repetition loop: the same passage at least four times, over at least 64 characters.

    As arXiv:1904.09751 counts phrases repeated at the end of a generation, but in characters: the limit of an answer
    may cut a passage anywhere.
    """
    periods = range(1, min(LONGEST, len(answer.text) // LOOP) + 1)
    return any(answer.text.endswith(answer.text[-n:] * max(LOOP, -(-LOOPED // n))) for n in periods)


def is_correct(answer: Answer, expected: str) -> bool:
    """Whether the final answer, after any chain of thought, matches; numbers are compared by value."""
    if answer.text.startswith(THINK) and END_THINK not in answer.text:
        return False  # the chain of thought was cut off
    final = final_answer(answer.text)
    return final is not None and normalized(final) == normalized(final_answer(expected) or expected)


def count_correct(answers: Sequence[Answer], expected: Sequence[str | None]) -> tuple[int, int]:
    """(number of correct answers, number of questions whose answer is known)."""
    known = [(a, e) for a, e in zip(answers, expected, strict=True) if e is not None]
    return sum(is_correct(a, e) for a, e in known), len(known)


def score(answers: Sequence[Answer], expected: Sequence[str | None], mode: str | None) -> dict[str, float]:
    """Accuracy, shares of well-formed answers and of those that loop (all in [0, 1]), mean length in tokens, and how
    many were cut off.

    Accuracy is that of questions with a known answer, and is left out without any.

    Args:
        mode: the mode of all answers; None for the one that each chose.
    """
    n, (right, known) = len(answers), count_correct(answers, expected)
    accuracy = {"accuracy": right / known} if known else {}
    return accuracy | {
        "well_formed": sum(well_formed(a, mode) for a in answers) / n,
        "tokens": sum(a.tokens for a in answers) / n,
        "cut_off": sum(not a.ended for a in answers),
        "loops": sum(map(loops, answers)) / n,
    }
