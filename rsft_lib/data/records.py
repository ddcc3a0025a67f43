"""Training records from JSON Lines or JSON files, as conversations."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

FIELDS = [("instruction", "output"), ("prompt", "response"), ("problem", "solution")]


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, record); the place, 'file:line', begins every error about the record.

    Reads `.jsonl` and `.jsonl.gz`, one object a line, and `.json`, a list of objects (there the place counts
    entries from 1).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no UTF-8, no JSON or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    lines = json.loads(path.read_text("utf-8-sig")) if path.suffix == ".json" else _lines(path)
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        record = line if path.suffix == ".json" else _parse(line, place)
        if not isinstance(record, dict):
            raise ValueError(f"{place}: found {type(record).__name__}, expected an object with fields")
        yield place, record


def to_messages(record: dict, place: str) -> list[dict]:
    """The conversation of a record: `messages`, or a pair such as `instruction` and `output`.

    Raises:
        ValueError: the fields are missing, or a text is empty or cannot be encoded.
    """
    if "messages" in record:
        messages = [{"content": None, **message} for message in record["messages"]]
    else:
        prompt, response = _pair(record, place)
        messages = [
            {"role": "user", "content": _text(record, prompt, place)},
            {"role": "assistant", "content": _text(record, response, place)},
        ]
    return messages


def _pair(record: dict, place: str) -> tuple[str, str]:
    for pair in FIELDS:
        if all(name in record for name in pair):
            return pair
    known = ", ".join("/".join(pair) for pair in FIELDS)
    raise ValueError(f"{place}: found the fields {sorted(record)}, expected messages or one of {known}")


def _text(record: dict, name: str, place: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {name} is {value!r}, expected a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {name} holds half of a surrogate pair at character {error.start}") from None
    return value


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from file


def _parse(line: bytes, place: str):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: no JSON ({error}); found {line[:60]!r}") from None
