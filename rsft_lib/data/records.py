"""Read rows of training data from JSON Lines, a JSON list (both also `.gz` or `.zst`), Parquet, or the Hub."""

import io
import json
import math
import re
import reprlib
from collections.abc import Iterable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pyarrow
import pyarrow.parquet

from rsft_lib.common.artifact import file_hash
from rsft_lib.common.paths import require_path, resolve

SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
LINE_LIMIT = 64 << 20  # bytes; longer lines are taken as a damaged file
BOM = b"\xef\xbb\xbf"


# The tokens that delimit the elements of a JSON list; a lone quote opens a string whose end has not been read yet.
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.S)
READ = 1 << 20  # bytes read at a time


class Row(NamedTuple):
    """A record as read: its number in the file, counted from 1 like lines, and its content.

    `content` is unparsed JSON, an object, or the exception that reading this row raised.
    """

    number: int
    content: bytes | dict | Exception


class Source(NamedTuple):
    """The source of rows: a data file, or a split of a dataset on the Hub (or in a folder) at a revision."""

    name: str
    split: str = ""
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.split}@{self.revision}" if self.split else self.name

    def rows(self) -> Iterator[Row]:
        return read_hub(*self) if self.split else read_rows(Path(self.name))

    def facts(self) -> dict[str, str | None]:
        """Manifest entries; for a dataset on the Hub, a revision that is a commit takes the place of the hash."""
        commit = self.revision if re.fullmatch("[0-9a-f]{40}", self.revision) else None
        return {"data": str(self), "data_sha256": commit if self.split else file_hash(Path(self.name))}


def source_of(data: str | Path, what: str = "data file") -> Source:
    """Resolve `data` to a source: a file, a folder with a dataset, `org/name` or `org/name:split@revision`.

    A folder's name may contain ':' and '@': the longest prefix of `data` that is a folder is used.

    Raises:
        FileNotFoundError: `data` is not a valid Hub name, and no such file or folder exists.
    """
    is_folder = resolve(data).is_dir()
    if not is_folder and (_kind(Path(data)) or resolve(data).is_file()):
        return Source(str(require_path(data, what)))
    text = str(data)
    cuts = [match.start() for match in re.finditer(r"[:@]|\Z", text)]
    cut = next((cut for cut in reversed(cuts) if resolve(text[:cut]).is_dir()), cuts[0])
    name, (split, _, revision) = text[:cut], text[cut:].removeprefix(":").partition("@")
    folder = resolve(name)
    if folder.is_dir() or not HUB_NAME.fullmatch(name):
        name = str(require_path(folder, what))
    return Source(name, split or "train", revision or "main")


def _kind(path: Path) -> str | None:
    """The last suffix that names a data format."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix in SUFFIXES), None)


def read_rows(path: Path) -> Iterator[Row]:
    """Iterate over the rows of a data file, with JSON unparsed and blank lines skipped.

    Only a few rows are in memory at a time (a few hundred of a Parquet file).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated or so damaged that rows cannot be separated, or it is a Parquet file with
            additional compression or duplicate column names.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist")
    compression = COMPRESSION.get(path.suffix)
    if (parquet := _kind(path) == ".parquet") and compression:
        raise ValueError(
            f"{path}: Parquet is compressed internally and is not read from {path.suffix}; unpack it first"
        )
    try:
        if parquet:
            file = pyarrow.parquet.ParquetFile(path)
            if len(set(names := file.schema_arrow.names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{path} has two columns {twice!r}; rename one of them")
            yield from _arrow_rows(file.iter_batches(batch_size=256))
            return
        with io.BufferedReader(pyarrow.input_stream(str(path), compression=compression), READ) as file:
            first = _skip_blanks(file)
            yield from _elements(file, path) if file.peek(1).startswith(b"[") else _lines(file, first)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read to its end ({error}): it is damaged; download it again") from error


def read_hub(name: str, split: str, revision: str) -> Iterator[Row]:
    """Iterate over the rows of a dataset on the Hugging Face Hub, or in a local folder of the same layout.

    Raises:
        FileNotFoundError: the dataset, split or revision does not exist or cannot be downloaded.
        ValueError: reading fails before the end.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split, revision=revision, streaming=True)
    except Exception as error:  # the library raises many types; each means that the dataset cannot be loaded
        raise FileNotFoundError(
            f"{name!r} is not a data file (.jsonl, .json, .parquet, also .gz or .zst), and no dataset with split "
            f"{split!r} at revision {revision!r} could be loaded from the Hub ({error}); check the name and the network"
        ) from error
    number = 0
    try:
        for row in _arrow_rows(dataset.with_format("arrow").iter(batch_size=256)):
            number = row.number
            yield row
    except (OSError, EOFError, pyarrow.ArrowException, ValueError) as error:
        raise ValueError(f"{name}:{split} cannot be read beyond row {number} ({error})") from error


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (place, record) from a data file; `place` is 'file:line', the prefix of every error about the record.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a row is not UTF-8, not JSON or not an object.
    """
    for row in read_rows(path):
        place = f"{path}:{row.number}"
        try:
            yield place, parse(row.content)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def parse(content: bytes | dict | Exception) -> dict:
    """Parse a row to an object; stricter than Python's JSON parser.

    Raises:
        ValueError: the row is not UTF-8, not JSON (NaN is not), not an object, has a duplicate name in an object or a
            number that is too large, or could not be read.
    """
    if isinstance(content, Exception):
        raise ValueError(f"the row cannot be read ({content})")
    if not isinstance(content, bytes):
        record = content
    elif len(content) > LINE_LIMIT:
        raise ValueError(f"the row has more than {LINE_LIMIT >> 20} MiB; is it a JSON Lines file?")
    else:
        try:
            record = DECODER.decode(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}); found {content[:60]!r}") from None
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected an object with fields")
    return record


def as_text(content: bytes | dict | Exception) -> str:
    """The content of a row as readable text; never raises."""
    if isinstance(content, bytes):
        return content.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    try:
        return json.dumps(content, ensure_ascii=False, default=str)
    except Exception:  # keys that are not strings, or too deep nesting
        return reprlib.repr(content)


def _skip_blanks(file: io.BufferedReader) -> int:
    """Seek to the first non-blank character; return its line number."""
    number = 1
    if file.peek(len(BOM)).startswith(BOM):
        file.read(len(BOM))
    while more := file.peek(1):
        blanks = file.read(len(more) - len(more.lstrip()))
        number += blanks.count(b"\n")
        if len(blanks) < len(more):
            break
    return number


def _lines(file: io.BufferedReader, first: int) -> Iterator[Row]:
    """The non-blank lines; `first` is the number of the current line."""
    for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), start=first):
        while len(line) > LINE_LIMIT and not line.endswith(b"\n"):  # skip the rest of a line that is too long
            rest = file.readline(LINE_LIMIT)
            if not rest or rest.endswith(b"\n"):
                break
        if line.strip():
            yield Row(number, line)


def _elements(file: io.BufferedReader, path: Path) -> Iterator[Row]:
    """The elements of a JSON list, separated by brackets and commas and not parsed."""
    text, begin, at, depth, number = b"", 0, 0, 0, 1  # `begin`: start of the element; `at`: end of the scanned text
    while more := file.read(max(READ, len(text) - begin)):
        if len(text) - begin > LINE_LIMIT:
            raise ValueError(f"{path}: row {number} of the list has more than {LINE_LIMIT >> 20} MiB: it is damaged")
        text, at, begin = text[begin:] + more, at - begin, 0
        for token in TOKEN.finditer(text, at):
            mark, end = token[0], token.end()
            if mark == b'"':
                break
            at = end
            depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
            if mark == b"}":
                depth = max(depth, 1)  # a brace cannot end the list; a surplus one invalidates only its own row
            if depth == 1 and mark == b"[":
                begin = end
            elif (depth == 1 and mark == b",") or depth == 0:
                element = text[begin : end - 1].strip()
                if element or depth == 1 or number > 1:
                    yield Row(number, element)
                number, begin = number + 1, end
                if depth == 0:
                    return _refuse_more(text[end:] + file.read(READ), path)
    raise ValueError(f"{path} ends inside its list, in row {number}: it is damaged; download it again")


def _refuse_more(rest: bytes, path: Path) -> None:
    if rest.strip():
        raise ValueError(f"{path}: found {rest.strip()[:60]!r} after the end of the list; is it JSON Lines?")


def _arrow_rows(tables: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Iterator[Row]:
    number = 0
    for table in tables:
        for record in _records(table):
            yield Row(number := number + 1, record)


def _records(table: pyarrow.RecordBatch | pyarrow.Table) -> list[dict | Exception]:
    """The rows of an Arrow table as JSON objects, with an exception in place of a row that Python cannot represent."""
    types = {field.name: field.type for field in table.schema}
    try:
        rows = table.to_pylist()
    except Exception as error:  # a date beyond year 9999, text that is not UTF-8: find the row
        if len(table) == 1:
            return [error]
        return [record for i in range(len(table)) for record in _records(table.slice(i, 1))]
    return [{name: _value(value, types[name]) for name, value in row.items()} for row in rows]


def _value(value, kind: pyarrow.DataType):
    """`_as_json`, or its exception in place of the value, so that only rows that use the column are rejected."""
    try:
        return _as_json(value, kind)
    except ValueError as error:
        return error


def _as_json(value, kind: pyarrow.DataType):
    """A value as JSON. Null fields of structs are dropped, since Arrow adds the fields of all rows to each.

    Decimals, dates, times and UUIDs become strings.

    Raises:
        ValueError: JSON cannot represent the value (bytes, NaN), or a map has duplicate keys.
    """
    types = pyarrow.types
    if value is None:
        return None
    if isinstance(kind, pyarrow.JsonType):  # its nulls are in the data and are kept
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError):
            return value
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(kind, pyarrow.BaseExtensionType):
        kind = kind.storage_type
    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return {name: _as_json(part, fields[name]) for name, part in value.items() if part is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_as_json(part, kind.value_type) for part in value]
    if types.is_map(kind):
        return _unique([(_key(key, kind.key_type), _as_json(part, kind.item_type)) for key, part in value])
    if isinstance(value, Decimal | date | time | timedelta | UUID):
        return str(value)
    raise ValueError(f"found {value!r:.60}, which JSON cannot represent")


def _key(key, kind: pyarrow.DataType) -> str:
    key = _as_json(key, kind)
    return key if isinstance(key, str) else json.dumps(key)


def _unique(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice in one object")
    return result


def _no_json(name: str):
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text:.60} is too large")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_json, parse_float=_finite)


def blocks(rows: Iterator[Row], records: int = 256, size: int = 4 << 20) -> Iterator[list[Row]]:
    """Group rows into lists of at most `records`, or fewer once they reach `size` bytes.

    Block boundaries depend only on the rows, not on the number of workers.
    """
    rows = iter(rows)
    while block := list(islice(rows, 1)):
        filled = size_of(block[0])
        while len(block) < records and filled < size and (row := next(rows, None)):
            block.append(row)
            filled += size_of(row)
        yield block


def size_of(row: Row) -> int:
    """Size of a row in its file in bytes; a guess for Parquet and the Hub."""
    return len(row.content) if isinstance(row.content, bytes) else 1024
