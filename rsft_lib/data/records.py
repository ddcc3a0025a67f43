"""Training records as conversations, from JSON Lines, JSON, Parquet (`.gz` and `.zst` too) or a dataset on the Hub."""

import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from rsft_lib.artifact import file_hash
from rsft_lib.paths import existing, resolve

FIELDS = [("instruction", "output"), ("prompt", "response"), ("problem", "solution")]
CHATS = ["messages", "conversations"]
SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
LINE_LIMIT = 64 << 20  # bytes; a longer line is no record but a damaged file

# What ShareGPT's `conversations` call what OpenAI's `messages` call role and content.
SHAREGPT_KEYS = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
ROLES = ("system", "user", "assistant", "tool")


class Row(NamedTuple):
    """A record as it was read: its number in the file, from 1, and a line still to be parsed or an object."""

    number: int
    content: bytes | dict


class Source(NamedTuple):
    """Where rows come from: a data file, or a split of a dataset on the Hub (or in a folder) at a revision."""

    name: str
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.split}@{self.revision}" if self.split else self.name

    def rows(self) -> Iterator[Row]:
        return read_hub(*self) if self.split else read_rows(Path(self.name))

    def facts(self) -> dict[str, str | None]:
        """What a manifest says of it; a dataset on the Hub is as good as a hash where its revision is a commit."""
        fixed = self.revision if re.fullmatch("[0-9a-f]{40}", self.revision) else None
        return {"data": str(self), "data_sha256": fixed if self.split else file_hash(Path(self.name))}


def source_of(data: str | Path, what: str = "data file") -> Source:
    """The source that `data` names: a file, a folder with a dataset, or `org/name`, `org/name:split@revision`.

    Raises:
        FileNotFoundError: it is a file's name, and no file is there.
    """
    if any(suffix in Path(data).suffixes for suffix in SUFFIXES) or resolve(data).is_file():
        return Source(str(existing(data, what)))
    name, _, revision = str(data).partition("@")
    name, _, split = name.partition(":")
    return Source(str(resolve(name)) if resolve(name).is_dir() else name, split or "train", revision or "main")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a data file, as they are read; lines are not parsed yet.

    A `.json` file that holds a list is read whole; all others take no more memory than a part of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read on, as it is truncated or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    try:
        if ".parquet" in path.suffixes:
            yield from _parquet_rows(path)
            return
        compression = COMPRESSION.get(path.suffix)
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), 1 << 20) as file:
            yield from _list_rows(file, path) if _holds_list(file) else _lines(file)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read to its end ({error}): it is damaged; fetch it again") from error


def read_hub(name: str, split: str, revision: str) -> Iterator[Row]:
    """The rows of a dataset on the Hugging Face Hub, or of a local folder that looks like one.

    Raises:
        FileNotFoundError: there is no such dataset, split or revision, or it cannot be had.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises many kinds; each means that the dataset is not here
        raise FileNotFoundError(
            f"{name!r} is no data file (.jsonl, .json, .parquet, also .gz or .zst), and no dataset with split "
            f"{split!r} at revision {revision!r} could be had from the Hub ({error}); check the name and the network"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield Row(number, row)


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, record) of a data file; the place, 'file:line', begins every error about the record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no UTF-8, no JSON or no object.
    """
    for row in read_rows(path):
        place = f"{path}:{row.number}"
        try:
            yield place, parse(row.content)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def parse(content: bytes | dict) -> dict:
    """The object on a line of JSON; strict, where Python's parser is lenient.

    Raises:
        ValueError: no UTF-8, no JSON (NaN is none), no object, or a name twice in one object.
    """
    if not isinstance(content, bytes):
        record = content
    elif len(content) > LINE_LIMIT:
        raise ValueError(f"the line has over {LINE_LIMIT >> 20} MiB; is it a JSON Lines file?")
    else:
        try:
            record = DECODER.decode(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON ({error}); found {content[:60]!r}") from None
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected an object with fields")
    return record


def as_text(content: bytes | dict) -> str:
    """What stood on a line, for a person to read."""
    if isinstance(content, bytes):
        return content.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return json.dumps(content, ensure_ascii=False, default=str)


def to_messages(record: dict, place: str, columns: dict[str, str] | None = None) -> list[dict]:
    """`conversation`, whose errors begin with `place`."""
    try:
        return conversation(record, columns)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def conversation(record: dict, columns: dict[str, str] | None = None) -> list[dict]:
    """The messages of a record: `messages`, `conversations`, or a pair such as `instruction` and `output`.

    Args:
        columns: what this dataset calls a field, e.g. {'prompt': 'question', 'response': 'answer'}.

    Raises:
        ValueError: the fields are missing, or a text is empty or cannot be encoded.
    """
    if columns:
        record = _renamed(record, columns)
    for name in CHATS:
        if record.get(name):
            return [_message(message, f"{name}[{i}]") for i, message in enumerate(_list(record[name], name))]
    for prompt, response in FIELDS:
        if prompt in record and response in record:
            return [
                {"role": "user", "content": _text(record[prompt], prompt)},
                {"role": "assistant", "content": _text(record[response], response)},
            ]
    known = ", ".join([*CHATS, *("/".join(pair) for pair in FIELDS)])
    raise ValueError(f"found the fields {sorted(record)}, expected one of {known}; or say in `columns` what they are")


def tools_of(record: dict) -> list[dict] | None:
    """The tools that a conversation may call, as the chat template takes them.

    Raises:
        ValueError: `tools` is no list.
    """
    return _list(record["tools"], "tools") if record.get("tools") else None


def _renamed(record: dict, columns: dict[str, str]) -> dict:
    missing = [theirs for theirs in columns.values() if theirs not in record]
    if missing:
        raise ValueError(f"found the fields {sorted(record)}, but `columns` names {', '.join(missing)}")
    return {ours: record[theirs] for ours, theirs in columns.items()} | (
        {"tools": record["tools"]} if "tools" in record else {}
    )


def _message(message, place: str) -> dict:
    """A message without what is null, its texts checked."""
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {message!r:.60}, expected an object with role and content")
    message = {SHAREGPT_KEYS.get(key, key): value for key, value in message.items() if value is not None}
    role = message["role"] = SHAREGPT_ROLES.get(message.get("role"), message.get("role"))
    if role not in ROLES:
        raise ValueError(f"{place}: role is {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(message.get("train", True), bool):
        raise ValueError(f"{place}: train is {message['train']!r}, expected true or false")
    if message.get("tool_calls"):
        _check_calls(message["tool_calls"], place)
    if "content" in message or not message.get("tool_calls"):
        must_speak = role in ("user", "assistant") and not message.get("tool_calls")
        message["content"] = _text(message.get("content"), f"{place}.content", empty=not must_speak)
    return message


def _check_calls(calls, place: str) -> None:
    for call in _list(calls, f"{place}.tool_calls"):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise ValueError(f"{place}: a tool call needs function.name and function.arguments, found {call!r:.80}")
        _text(json.dumps(function, ensure_ascii=False), f"{place}.tool_calls")


def _list(value, name: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list")
    return value


def _text(value, name: str, empty: bool = False) -> str:
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{name} is {value!r:.60}, expected a text that is not empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from None
    return value


def _lines(file: io.BufferedReader) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), start=1):
        while len(line) > LINE_LIMIT and not line.endswith(b"\n"):  # pass over the rest of a line that is refused
            rest = file.readline(LINE_LIMIT)
            if not rest or rest.endswith(b"\n"):
                break
        yield Row(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _holds_list(file: io.BufferedReader) -> bool:
    return file.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _list_rows(file: io.BufferedReader, path: Path) -> Iterator[Row]:
    try:
        rows = DECODER.decode(file.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error})") from None
    for number, row in enumerate(rows, start=1):
        yield Row(number, row)


def _parquet_rows(path: Path) -> Iterator[Row]:
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256)
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield Row(number, row)


def _unique(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _no_json(name: str):
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_json)


def blocks(rows: Iterator[Row], records: int = 256, size: int = 4 << 20) -> Iterator[list[Row]]:
    """Rows in lists of at most `records`, cut sooner where their lines reach `size` bytes.

    Where a block ends depends on the rows alone, so every machine that reads a file sees the same blocks.
    """
    rows = iter(rows)
    while block := list(islice(rows, 1)):
        filled = _size(block[0])
        while len(block) < records and filled < size and (row := next(rows, None)):
            block.append(row)
            filled += _size(row)
        yield block


def _size(row: Row) -> int:
    return len(row.content) if isinstance(row.content, bytes) else 1024
