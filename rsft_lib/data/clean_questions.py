"""Read questions to be answered, without repeated ones and without those of evaluation sets."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from rsft_lib.common.artifact import new_folder, reusable
from rsft_lib.common.paths import resolve
from rsft_lib.data.answers import final_answer
from rsft_lib.data.conversation import CHATS, PAIRS, RULES, conversation, is_empty
from rsft_lib.data.overlap import EvaluationQuestions, normalized_words, signs
from rsft_lib.data.records import Source, parse, source_of
from rsft_lib.data.rejects import Rejects, reject

LISTS = QUESTIONS, LEAKS, FORMS, DUPLICATES = "questions.jsonl", "leaks.jsonl", "forms.jsonl", "duplicates.jsonl"
KEPT = ("id", "difficulty")  # fields copied from a record to its question
UNKNOWN = "?"  # in place of the answer that a layout requires and a file of questions lacks


def clean_questions(
    questions: str | Path,
    folder: str | Path,
    evaluation: Sequence[str | Path] = (),
    *,
    columns: dict[str, str] | None = None,
    count: int = 0,
    reject_limit: float = 0.001,
    overwrite: bool = False,
) -> dict:
    """Write `questions.jsonl`, distinct questions with their known answers, in the order of their file.

    `leaks.jsonl` lists the questions left out since they share a run of 13 words with an evaluation question
    (`data.overlap`), with the words; `forms.jsonl` those that share only forms, and are not left out;
    `duplicates.jsonl` those with the words and signs of an earlier one; `FOLDER.rejected.jsonl`, beside the folder,
    the unusable records, also of the evaluation sets.

    Args:
        questions: a file or Hub name, in any layout of notebook 03 (`data.conversation`), or with a field `question`;
            answers may be missing. The known answer is the field `answer` or else the final answer of the response.
        evaluation: files or Hub names in the same layouts; their answers are not read.
        columns: field -> its name in `questions`, and in the evaluation sets that have it.
        count: the number of questions to keep; 0 for all.
        reject_limit: maximum fraction of unusable records.
        overwrite: also replace a folder made from other questions.

    Returns:
        The manifest. `counts`: records read and rejected; questions that are duplicates, leaked, beyond `count` and
        kept, and that share forms; distinct evaluation questions, and rejected records of these.

    Raises:
        FileExistsError: `folder` is something else, or was made from other questions.
        FileNotFoundError: there is no such file.
        ValueError: too many records are unusable, an evaluation set has no usable ones, or no question is left.
    """
    source, others = source_of(questions, "questions"), [source_of(one, "evaluation set") for one in evaluation]
    facts: dict[str, Any] = {
        "made_by": "clean_questions", "rules": RULES, **source.facts(), "columns": columns or {}, "count": count,
        "evaluation": {str(one): one.facts()["data_sha256"] for one in others},
    }  # fmt: skip
    destination = resolve(folder)
    if None not in (facts["data_sha256"], *facts["evaluation"].values()) and (done := reusable(destination, facts)):
        return done
    with (
        new_folder(destination, facts, source=["data"], overwrite=overwrite) as temporary,
        Rejects(destination, reject_limit) as rejects,
    ):
        tally = Counter[str]()
        known = _evaluation_questions(others, columns or {}, rejects, tally)
        before = {"read": tally["read"], "rejected": rejects.count}
        rows = _read(source, rejects, tally, partial(_answered, columns=columns or {}))
        with ExitStack() as stack:
            lists = [stack.enter_context((temporary / name).open("w", encoding="utf-8")) for name in LISTS]
            scratch = stack.enter_context(TemporaryFile("w+", dir=temporary, encoding="utf-8"))
            numbers = _distinct(rows, known, lists.pop(), scratch)
            scratch.seek(0)
            numbers |= _without_leaks(scratch, known, count, *lists)
        rejects.settle(tally["read"])
        facts["counts"] = {
            "read": tally["read"] - before["read"], "rejected": rejects.count - before["rejected"], **numbers,
            "evaluation": len(known.places), "evaluation_rejected": before["rejected"],
        }  # fmt: skip
        if not facts["counts"]["kept"]:
            raise ValueError(f"no question is left of {source}: {facts['counts']}")
    return facts


def _evaluation_questions(
    sources: list[Source], columns: dict[str, str], rejects: Rejects, tally: Counter
) -> EvaluationQuestions:
    known = EvaluationQuestions()
    for source in sources:
        before = tally["used"]
        for place, (messages, *_) in _read(source, rejects, tally, partial(_evaluation_question, columns=columns)):
            known.add(place, text_of(messages))
        if tally["used"] == before:
            rejects.settle(tally["read"])
            raise ValueError(f"evaluation set {source} has no question that can be compared")
    return known


def _read(
    source: Source, rejects: Rejects, tally: Counter, question: Callable[[dict], Any]
) -> Iterator[tuple[str, Any]]:
    """(place, `question(record)`) of each row; one that raises any exception is rejected. Counts rows read and used."""
    for row in source.rows():
        tally["read"] += 1
        try:
            found = question(parse(row.content))
            tally["used"] += 1
        except Exception as error:
            rejects.add([reject(str(source), row, error)], seen=tally["read"])
            continue
        yield f"{source}:{row.number}", found


def _distinct(
    rows: Iterator[tuple[str, dict]], known: EvaluationQuestions, duplicates: IO, scratch: IO
) -> dict[str, int]:
    """Write each distinct question to `scratch`, and list the others; returns the number of these."""
    first: dict[bytes, str] = {}
    repeated = 0
    for place, record in rows:
        text = text_of(record["messages"])
        words = " ".join(normalized_words(text)) or text
        key = f"{words} {signs(text)}".encode()
        earlier = first.setdefault(hashlib.blake2b(key, digest_size=16).digest(), place)
        if earlier == place:
            known.count(text)
            _line(scratch, {"place": place, **record})
        else:
            repeated += 1
            _line(duplicates, {"place": place, "question": text, "same_as": earlier})
    return {"duplicates": repeated}


def _without_leaks(
    scratch: IO, known: EvaluationQuestions, count: int, questions: IO, leaks: IO, forms: IO
) -> dict[str, int]:
    """Write the questions to keep, and list those that share words with an evaluation set; returns their numbers."""
    numbers = {"leaked": 0, "beyond": 0, "kept": 0, "with_forms": 0}
    for line in scratch:
        record = json.loads(line)
        place, text = record.pop("place"), text_of(record["messages"])
        match = known.find(text)
        if match:
            shared = {"evaluation": match.place, "words": match.words, "text": match.text}
            _line(forms if match.form else leaks, {"place": place, "question": text, **shared})
            numbers["with_forms" if match.form else "leaked"] += 1
        if match and not match.form:
            continue
        if count and numbers["kept"] == count:
            numbers["beyond"] += 1
            continue
        numbers["kept"] += 1
        _line(questions, record)
    return numbers


def _line(file, record: dict) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def question_of(record: dict, columns: dict[str, str] | None = None) -> tuple[list[dict], list[dict] | None, str]:
    """(the conversation of a record up to its last question, tools, the answer that it has, or '').

    Raises:
        ValueError: there is no question, or a field is of the wrong type or damaged.
    """
    columns = {ours: theirs for ours, theirs in (columns or {}).items() if ours != "answer"}
    messages, tools, _ = conversation(_with_answer(record, columns), columns)
    response = ""
    while messages and messages[-1]["role"] == "assistant":
        response = messages.pop().get("content") or ""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"found the roles {', '.join(m['role'] for m in messages)}; expected a user's question last")
    return messages, tools, response


def text_of(messages: list[dict]) -> str:
    """What the user asks, in all turns."""
    return "\n\n".join(message["content"] for message in messages if message["role"] == "user")


def _evaluation_question(record: dict, columns: dict[str, str]) -> tuple[list[dict], list[dict] | None, str]:
    """`question_of`, with the names in `columns` that this record has."""
    return question_of(record, {ours: theirs for ours, theirs in columns.items() if theirs in record})


def _answered(record: dict, columns: dict[str, str]) -> dict:
    """A record as a line of `questions.jsonl`.

    Raises:
        ValueError: there is no question, or its answer is not known.
    """
    messages, tools, response = question_of(record, columns)
    answer = record.get(columns.get("answer", "answer"))
    answer = final_answer(response) if is_empty(answer) else answer
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"the known answer is {answer!r:.60}; expected text or a number in `answer`, or a response "
                         "with a final answer (`#### x`, `\\boxed{x}` or `Answer: x`)")  # fmt: skip
    kept = {name: record[name] for name in KEPT if not is_empty(record.get(name))}
    known = {"answer": final_answer(str(answer)) or str(answer)}
    line = {"messages": messages, **({"tools": tools} if tools else {}), **known, **kept}
    json.dumps(line, ensure_ascii=False, allow_nan=False).encode()  # raises, where JSON cannot represent a field
    return line


def _with_answer(record: dict, columns: dict[str, str]) -> dict:
    """The record with what a file of questions lacks for a layout of `conversation`."""
    pairs = [(columns.get(prompt, prompt), columns.get(response, response)) for prompt, response in PAIRS]
    if not any(name in record for name in (*CHATS, *(prompt for prompt, _ in pairs))) and "question" in record:
        record, pairs = record | {"prompt": record["question"]}, [("prompt", "response")]
    lacking = [response for prompt, response in pairs if prompt in record and is_empty(record.get(response))]
    return dict.fromkeys(lacking, UNKNOWN) | {name: value for name, value in record.items() if name not in lacking}
