"""Evaluation questions: the distinct prompts of held-out records, with their full conversation."""

import json
import math
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rsft_lib.common.paths import require_path
from rsft_lib.data.conversation import conversation, is_empty
from rsft_lib.data.records import read_records
from rsft_lib.tokenizer.dialect import MODES, THINKLESS, Dialect

MEASURED = 2000  # records whose answers are measured


class Question(NamedTuple):
    """A conversation up to the answer, and the expected final answer and the problem's difficulty, if known."""

    messages: list[dict]
    tools: list[dict] | None = None
    expected: str | None = None
    difficulty: float | None = None

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


def held_out_questions(path: str | Path, count: int, dialect: Dialect = THINKLESS) -> list[Question]:
    """The first `count` distinct questions of a file of records.

    Args:
        dialect: switches at the end of the last message are removed, so that a question is asked once in each mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record is invalid, there is no question, or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"questions is {count}; expected at least 1")
    questions: dict[str, Question] = {}
    for place, record in read_records(require_path(path, "held-out records")):
        try:
            messages, tools, _ = conversation(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        answer = record.get("answer")
        if messages:
            last = messages[-1]
            messages[-1] = last | {"content": dialect.without_switch(last["content"])[0]}
            expected = None if is_empty(answer) else str(answer)
            difficulty = record.get("difficulty")
            question = Question(messages, tools, expected, difficulty if isinstance(difficulty, int | float) else None)
            questions.setdefault(json.dumps(messages), question)
        if len(questions) == count:
            break
    if not questions:
        raise ValueError(f"{path} contains no questions")
    return list(questions.values())


def room_for_answers(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """A limit for answers in tokens: a quarter more than the longest one in the first records of a file, with EOS.

    Raises:
        ValueError: the records have no answers.
    """
    longest = 0
    for _, record in islice(read_records(require_path(path, "held-out records")), MEASURED):
        for message in conversation(record).messages:
            if message["role"] == "assistant":
                text = (message.get("reasoning_content") or "") + (message.get("content") or "")
                longest = max(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not longest:
        raise ValueError(f"{path} has no answers whose lengths could limit the model's: set max_new_tokens")
    return math.ceil(1.25 * (longest + 1))


def modes_asked(path: str | Path) -> list[str | None]:
    """The modes in which to evaluate a model trained on such records, by their field `mode` (from notebook 03).

    Each mode, and None for the model's choice; only 'other' if no record has a control token.
    """
    modes = {str(record.get("mode")) for _, record in read_records(require_path(path, "held-out records"))}
    return ["other"] if modes == {"other"} else [*MODES, None]
