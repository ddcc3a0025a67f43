"""Convert records to samples of a hybrid dataset: a question, its answer, and the mode of the answer."""

import hashlib
import json
import math
from typing import NamedTuple

from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.data.conversation import conversation, is_empty
from rsft_lib.data.records import Row, parse
from rsft_lib.tokenizer.chat import REASONING
from rsft_lib.tokenizer.dialect import END_THINK, MODE_NAMES, SHORT, TAGS, THINK, Dialect

# Fields copied from the record to the sample, unless used in it otherwise; the last two are of notebook 10.
COPIED = ("id", "answer", "difficulty", "long_right", "short_right")


class Sample(NamedTuple):
    """A record as it will be written, also as a line of JSON."""

    record: dict
    line: bytes
    context: str
    """Everything before the answer: system prompt, earlier turns, question."""
    facts: dict[str, float]
    """Its fields of `pairs.ROW`, except lengths and position."""
    unused: tuple[str, ...] = ()
    """Names of the record's non-empty fields that are not in the sample."""


class Style(NamedTuple):
    """How samples are written."""

    dialect: Dialect
    empty_think: bool = False
    """Whether an empty chain of thought is accepted."""


def long_sample(row: Row, columns: dict[str, str], style: Style) -> Sample:
    """A sample whose answer is `<think>` thoughts `</think>` answer.

    Raises:
        ValueError: the answer has another form, or the record cannot be used.
    """
    return _read(row, columns, style, lambda answer: ("think", _long(answer, style)))


def short_sample(row: Row, columns: dict[str, str], style: Style) -> Sample:
    """A sample with a concise answer, written as the dialect does: `<short>` or an empty think block before it.

    Raises:
        ValueError: the answer contains a chain of thought, or the record cannot be used.
    """
    return _read(row, columns, style, lambda answer: ("short", _short(answer, style)))


def declared_sample(row: Row, columns: dict[str, str], style: Style) -> Sample:
    """A sample whose mode is given by the beginning of its answer, in the dialect or with `<short>`; 'other' without.

    Raises:
        ValueError: the answer contains a control token elsewhere, or the record cannot be used.
    """

    def mode_of(answer: str) -> tuple[str, str]:
        mode = "short" if answer.startswith(SHORT) else style.dialect.mode_of(answer)
        if mode == "other" and (tags := TAGS.findall(answer)):
            raise ValueError(f"an answer contains {' '.join(tags)} but begins with {answer[:20]!r}")
        read = {"think": _long, "short": _short}.get(mode, lambda answer, style: answer)
        return mode, read(answer, style)

    return _read(row, columns, style, mode_of)


def cut_sample(sample: Sample, dialect: Dialect) -> Sample:
    """A short sample with the text after the chain of thought of a long one."""
    question = dialect.ask(sample.record["instruction"], "short")
    answer = dialect.write("short", "", sample.record["output"].partition(END_THINK)[2].strip())
    record = sample.record | {"instruction": question, "output": answer, "mode": "short"}
    context = sample.context.removesuffix(sample.record["instruction"]) + question
    return Sample(record, _line(record), context, sample.facts | {"mode": MODE_NAMES.index("short"), "cut": True})


def _long(answer: str, style: Style) -> str:
    tags = TAGS.findall(answer)
    if tags != [THINK, END_THINK] or not answer.startswith(THINK):
        raise ValueError(
            f"a long answer must begin with {THINK} and contain {END_THINK} once, before the final answer; found "
            f"{' '.join(tags) or 'no tags'}, and {answer[:20]!r} at its beginning"
        )
    thoughts, _, rest = answer.removeprefix(THINK).partition(END_THINK)
    if not rest.strip():
        raise ValueError(f"empty answer after {END_THINK}")
    if not thoughts.strip() and not style.empty_think:
        hint = "such an answer is a short one" if style.dialect.empty_block else "set empty_think to accept this"
        raise ValueError(f"nothing between {THINK} and {END_THINK}; {hint}")
    return style.dialect.write("think", thoughts, rest)


def _short(answer: str, style: Style) -> str:
    opening = SHORT
    if not answer.startswith(SHORT) and style.dialect.mode_of(answer) == "short":
        opening = answer[: answer.index(END_THINK) + len(END_THINK)]
    answer = answer.removeprefix(opening)
    if tags := TAGS.findall(answer):
        raise ValueError(f"a short answer must not contain {' '.join(tags)}")
    if not answer.strip():
        raise ValueError(f"empty answer after {opening}")
    return style.dialect.write("short", "", answer)


def _read(row: Row, columns: dict[str, str], style: Style, mode_of) -> Sample:
    record = parse(row.content)
    messages, tools, unused = conversation(record, columns)
    system, turns = _in_turns(messages)
    *earlier, last = turns
    history = [_earlier_turn(question, answer, style.dialect) for question, answer in earlier]
    kept = {name: record[name] for name in COPIED if name in unused and not isinstance(record[name], Exception)}
    left_out = [name for name in (*unused, *_left_out(messages)) if name not in kept]
    mode, answer = mode_of(last[1])
    question, asked = style.dialect.without_switch(last[0])
    if asked not in (None, mode):
        raise ValueError(f"the question asks for mode {asked}, but the answer is in mode {mode}: {answer[:20]!r}")
    asking = style.dialect.ask(question, mode if mode != "other" else None)
    sample = {"instruction": asking, "output": answer, "mode": mode}
    sample |= {"system": system} if system else {}
    sample |= {"history": history} if history else {}
    sample |= {"tools": tools} if tools else {}
    sample |= kept
    stated, final = _stated(kept), final_answer(answer)
    if stated and "short_right" in kept:  # notebook 10 has verified it, maybe in a notation unknown to `normalized`
        final = stated
    if final and stated is None:
        left_out += ["answer"] * ("answer" in sample)
        sample["answer"] = final
    context = "\n\n".join([*([system] if system else []), *(text for turn in history for text in turn), asking])
    prompt = [" ".join(text.split()) for text in (system, *(text for turn in earlier for text in turn), question)]
    problem = json.dumps([*prompt, tools], default=str)  # independent of white space
    claim = normalized(final or stated or "")
    facts = {
        "mode": MODE_NAMES.index(mode),
        "cut": False,
        "line": row.number,
        "question": _hash(" ".join(style.dialect.without_switch(turns[0][0])[0].split())),
        "problem": _hash(problem),
        "claim": _hash(problem, claim) if claim else 0,
        "wrong": bool(final and stated and normalized(final) != normalized(stated)),
        "difficulty": _difficulty(record, columns),
        "given": messages[-1].get("mode_given", False),
    }
    return Sample(sample, _line(sample), context, facts, tuple(left_out))


def _earlier_turn(question: str, answer: str, dialect: Dialect) -> list[str]:
    """A question and its answer, written in the dialect if the answer is in a mode."""
    mode, tags = "short" if answer.startswith(SHORT) else dialect.mode_of(answer), TAGS.findall(answer)
    if mode == "other" or tags not in ([THINK, END_THINK], [SHORT]):
        return [question, answer]
    thoughts, _, rest = answer.removeprefix(tags[0]).rpartition(END_THINK)
    return [dialect.ask(question, mode), dialect.write(mode, thoughts, rest)]


def _left_out(messages: list[dict]) -> list[str]:
    """Names of the message fields that a sample, which keeps only content and chain of thought, lacks."""
    names = []
    for message in messages:
        used = {"role", "content"}
        if message["role"] == "assistant":
            thoughts = next((message[name] for name in REASONING if message.get(name)), None)
            used |= {name for name in REASONING if message.get(name) == thoughts}
            used |= {"mode_given"} if message is messages[-1] else set()
        names += [f"messages[].{name}" for name, value in message.items() if name not in used and not is_empty(value)]
    return list(dict.fromkeys(names))


def _in_turns(messages: list[dict]) -> tuple[str, list[list[str]]]:
    """(system prompt or '', the turns as [question, answer])."""
    roles = [message["role"] for message in messages]
    system, rest = (messages[0]["content"], messages[1:]) if roles[:1] == ["system"] else ("", messages)
    if not rest or [message["role"] for message in rest] != ["user", "assistant"] * (len(rest) // 2):
        raise ValueError(
            f"found the roles {', '.join(roles)}; expected alternating user and assistant messages after an optional "
            "system message. Notebook 04 accepts other conversations unchanged"
        )
    texts = [message["content"] if message["role"] == "user" else _answer(message) for message in rest]
    return system, [list(turn) for turn in zip(texts[::2], texts[1::2], strict=True)]


def _answer(message: dict) -> str:
    """The content of an answer, preceded by its chain of thought if that is in a separate field."""
    if message.get("tool_calls"):
        raise ValueError("an answer calls a tool; notebook 04 accepts such conversations unchanged")
    thoughts = next((message[name] for name in REASONING if message.get(name)), "")
    if message.get("thoughts_cut"):
        raise ValueError("thoughts_cut: a budget has cut this answer already; notebook 04 accepts it unchanged")
    if not thoughts:
        return message["content"]
    if tags := TAGS.findall(thoughts + message["content"]):
        raise ValueError(f"an answer with a separate chain of thought contains {' '.join(tags)}")
    return f"{THINK}\n{thoughts.strip()}\n{END_THINK}\n\n{message['content']}"


def _stated(record: dict) -> str | None:
    """The final answer in a record's field `answer`, which may contain a complete solution, as in GSM8K."""
    stated = record.get("answer")
    if not isinstance(stated, str | int | float) or not str(stated).strip():
        return None
    return final_answer(str(stated)) or str(stated)


def _difficulty(record: dict, columns: dict[str, str]) -> float:
    """The share of wrong short answers that notebook 10 found, or else the field `difficulty`; NaN without a number."""
    measured = "difficulty" not in columns and record.get("short_right") is not None
    try:
        return 1 - float(record["short_right"]) if measured else float(record[columns.get("difficulty", "difficulty")])
    except (KeyError, TypeError, ValueError):
        return math.nan


def _line(record: dict) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"the sample cannot be written as JSON ({error})") from None


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")
