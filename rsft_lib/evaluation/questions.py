"""Questions that a model is asked: held-out ones with all that comes before the answer, each once."""

import json
from pathlib import Path
from typing import NamedTuple

from rsft_lib.common.paths import existing
from rsft_lib.data.conversation import conversation, is_empty
from rsft_lib.data.records import read_records
from rsft_lib.tokenizer.chat import MODES


class Question(NamedTuple):
    """A conversation up to where the model answers, and the final answer that is expected, if it is known."""

    messages: list[dict]
    tools: list[dict] | None = None
    expected: str | None = None

    @property
    def text(self) -> str:
        """What was asked last."""
        return self.messages[-1]["content"]


def held_out_questions(path: str | Path, count: int) -> list[Question]:
    """The first `count` questions of a file of records; one that several records answer is asked once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a record cannot be read, there is no question, or none is asked for.
    """
    if count < 1:
        raise ValueError(f"questions is {count}; ask at least 1")
    found: dict[str, Question] = {}
    for place, record in read_records(existing(path, "held-out records")):
        try:
            messages, tools, _ = conversation(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        answer = record.get("answer")
        if messages:
            asked = Question(messages, tools, None if is_empty(answer) else str(answer))
            found.setdefault(json.dumps(messages), asked)
        if len(found) == count:
            break
    if not found:
        raise ValueError(f"{path} holds no question")
    return list(found.values())


def modes_asked(path: str | Path) -> list[str | None]:
    """In which modes a model that learned from such records is asked, by the field `mode` that notebook 03 writes.

    In each mode and, as None, in the one that it chooses; or in 'other' alone, where no record has a control token.
    """
    modes = {str(record.get("mode")) for _, record in read_records(existing(path, "held-out records"))}
    return ["other"] if modes == {"other"} else [*MODES, None]
