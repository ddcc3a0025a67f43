"""The answers of one evaluation as JSON Lines, a question per line, in `answers/` of a run folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rsft_lib.common.temporary import new_file
from rsft_lib.generation.answer import Answer, is_correct
from rsft_lib.generation.questions import Question
from rsft_lib.tokenizer.dialect import dialect_of

FOLDER = "answers"
NAMES = {"think": "think", "short": "short", "choice": None, "answer": "other"}  # name in files and metrics -> mode


class Asked(NamedTuple):
    """A question and its answer in each mode; `expected` is the known answer."""

    question: str
    answers: dict[str | None, Answer]
    expected: str | None


def write_answers(
    run: Path, iteration: int, questions: Sequence[Question], answers: dict[str | None, list[Answer]]
) -> None:
    """Write the answers of a step to the run folder, replacing those of an earlier attempt at it."""
    (run / FOLDER).mkdir(exist_ok=True)
    with new_file(run / FOLDER / f"step_{iteration:07d}.jsonl") as file:
        for number, question in enumerate(questions):
            given = {name: answers[mode][number] for name, mode in NAMES.items() if mode in answers}
            record = {
                "question": question.text,
                "expected": question.expected,
                "answers": {name: _fields(answer, question.expected) for name, answer in given.items()},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _fields(answer: Answer, expected: str | None) -> dict:
    correct = None if expected is None else is_correct(answer, expected)
    fields = {"text": answer.text, "tokens": answer.tokens, "ended": answer.ended, "correct": correct}
    return fields | {"dialect": answer.dialect.name}


def remove_later(run: Path, iteration: int) -> None:
    """Remove the answers of steps after `iteration`, from which a run resumes."""
    for path in (run / FOLDER).glob("step_*.jsonl"):
        if _step(path) > iteration:
            path.unlink()


def newest_answers(run: Path, count: int) -> tuple[int, list[Asked]]:
    """The newest step with answers, and the first `count` of them; (0, []) without any."""
    path = max((run / FOLDER).glob("step_*.jsonl"), key=_step, default=None)
    if path is None:
        return 0, []
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return _step(path), [_asked(record) for record in records]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _asked(record: dict) -> Asked:
    answers = {
        NAMES[name]: Answer(found["text"], found["tokens"], found["ended"], dialect_of(found))
        for name, found in record["answers"].items()
    }
    return Asked(record["question"], answers, record["expected"])
