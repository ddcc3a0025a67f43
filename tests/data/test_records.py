"""Reading records, and rejecting invalid ones."""

import datetime
import decimal
import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from support import to_messages

from rsft_lib.data.conversation import conversation
from rsft_lib.data.records import LINE_LIMIT, Row, blocks, parse, read_hub, read_records, read_rows, source_of
from rsft_lib.data.rejects import Rejects, reject

PAIR = {"instruction": "2 + 2 ?", "output": "<think>\nhm\n</think>\n\n4"}
MESSAGES = [{"role": "user", "content": PAIR["instruction"]}, {"role": "assistant", "content": PAIR["output"]}]
LINE = json.dumps(PAIR)
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}


def write(folder, name: str):
    path = folder / name
    text = json.dumps([PAIR, PAIR]) if ".json" in path.suffixes else f"{LINE}\n{LINE}\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(text.encode())
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR]), path)
    else:
        path.write_text(("\ufeff" if "bom" in name else "") + text)
    return path


KINDS = "a.jsonl a.jsonl.gz a.jsonl.zst a.json a.json.gz a.json.zst bom.json bom.jsonl a.parquet"


@pytest.mark.parametrize("name", KINDS.split())
def test_every_kind_of_file_gives_the_same_records_with_their_places(name, tmp_path):
    path = write(tmp_path, name)
    assert list(read_records(path)) == [(f"{path}:1", PAIR), (f"{path}:2", PAIR)]


def test_maps_and_json_of_arrow_are_objects_and_only_nulls_that_arrow_added_go(tmp_path):
    part = pyarrow.struct({"x": pyarrow.int64(), "y": pyarrow.int64()})
    maps = pyarrow.array([[("a", {"x": 1}), ("b", {"y": 2})], [], None], pyarrow.map_(pyarrow.string(), part))
    texts = pyarrow.array(['{"a": null, "b": [{"c": null}]}', "{cut off", None])
    table = pyarrow.table({"map": maps, "json": pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [record for _, record in read_records(tmp_path / "a.parquet")] == [
        {"map": {"a": {"x": 1}, "b": {"y": 2}}, "json": {"a": None, "b": [{"c": None}]}},
        {"map": {}, "json": "{cut off"},
        {"map": None, "json": None},
    ]


def columns(folder, **values):
    pyarrow.parquet.write_table(pyarrow.table(values), folder / "a.parquet")
    return folder / "a.parquet"


def test_numbers_and_dates_that_json_lacks_are_their_text_wherever_they_stand(tmp_path):
    day, moment = datetime.date(2020, 1, 31), datetime.datetime(2020, 1, 31, 12, 30)
    path = columns(
        tmp_path,
        price=[decimal.Decimal("1.50")],
        part=[{"days": [day], "moment": moment}],
        clock=[datetime.time(12, 30)],
        span=[datetime.timedelta(days=1, seconds=2)],
        map=pyarrow.array([[(day, 1)]], pyarrow.map_(pyarrow.date32(), pyarrow.int64())),
        numbers=pyarrow.array([[(7, True)]], pyarrow.map_(pyarrow.int64(), pyarrow.bool_())),
    )
    [(_, record)] = read_records(path)
    assert record == {
        "price": "1.50",
        "part": {"days": ["2020-01-31"], "moment": "2020-01-31 12:30:00"},
        "clock": "12:30:00",
        "span": "1 day, 0:00:02",
        "map": {"2020-01-31": 1},
        "numbers": {"7": True},
    }


def test_lists_of_arrow_types_of_their_own_stay_lists(tmp_path):
    tensor = pyarrow.fixed_shape_tensor(pyarrow.float64(), [2])
    values = pyarrow.ExtensionArray.from_storage(tensor, pyarrow.array([[1.0, 2.0]], tensor.storage_type))
    assert [record for _, record in read_records(columns(tmp_path, x=values))] == [{"x": [1.0, 2.0]}]


TEXTS = pyarrow.map_(pyarrow.string(), pyarrow.string())
NO_JSON = [
    (pyarrow.array([1.5, float("nan")]), "found nan, which JSON cannot represent"),
    (pyarrow.array([{"y": [1.5]}, {"y": [float("-inf")]}]), "found -inf, which"),
    (pyarrow.array([[], [{"y": b"ab"}]]), "found b'ab', which"),
    (pyarrow.array([[("k", "1")], [("k", "1"), ("k", "2")]], TEXTS), "'k' appears twice in one object"),
]


@pytest.mark.parametrize(("values", "reason"), NO_JSON, ids=["nan", "inf", "bytes", "map"])
def test_what_json_lacks_in_a_column_is_refused_where_the_column_is_used(values, reason, tmp_path):
    path = columns(tmp_path, x=values, instruction=["2 ?"] * 2, output=["<short>4"] * 2)
    rows = [record for _, record in read_records(path)]
    assert conversation(rows[1]).unused == ("x",)
    for field in ("instruction", "tools"):
        with pytest.raises(ValueError, match=f"{field}: {reason}"):
            conversation({**rows[1], field: rows[1]["x"]})


@pytest.mark.parametrize(
    "row", [{datetime.date(2020, 1, 1): 1}, {b"a": 1}, {"a": {(1, 2): b""}}, ValueError("x"), b"\xff"]
)
def test_a_row_is_reported_whatever_it_holds(row):
    assert reject("a.parquet", Row(1, row), ValueError("x")).record


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has two columns 'prompt'"):
        list(read_rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize("blanks", [65, 3 << 20])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_any_number_of_blanks_may_stand_before_the_records(start, blanks, tmp_path):
    (tmp_path / "list").write_bytes(start + b"\n" * blanks + f"[{LINE},\n{LINE}]".encode())
    (tmp_path / "lines").write_bytes(start + b"\n" * blanks + f"  {LINE}\n{LINE}".encode())
    assert [(row.number, parse(row.content)) for row in read_rows(tmp_path / "list")] == [(1, PAIR), (2, PAIR)]
    numbers = [(row.number, parse(row.content)) for row in read_rows(tmp_path / "lines")]
    assert numbers == [(blanks + 1, PAIR), (blanks + 2, PAIR)]


def test_a_brace_too_many_in_a_list_spoils_its_row_alone(tmp_path):
    (tmp_path / "a.json").write_text(f"[{LINE}, {LINE}}}, {LINE}]")
    first, second, third = read_rows(tmp_path / "a.json")
    assert parse(first.content) == parse(third.content) == PAIR
    with pytest.raises(ValueError, match="not JSON .Extra data"):
        parse(second.content)


def test_the_last_suffix_says_what_a_file_holds(tmp_path):
    (tmp_path / "a.parquet.jsonl").write_text(f"{LINE}\n")
    assert [record for _, record in read_records(tmp_path / "a.parquet.jsonl")] == [PAIR]
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(write(tmp_path, "a.parquet").read_bytes()))
    with pytest.raises(ValueError, match=r"a.parquet.gz: Parquet is compressed internally .* unpack it first"):
        list(read_rows(packed))


@pytest.mark.parametrize("name", ["set@2", "set:x", "set:x@2", "set.parquet"])
def test_a_folder_is_found_whatever_is_in_its_name(name, tmp_path):
    (tmp_path / "set").mkdir()
    folder = tmp_path / name
    folder.mkdir()
    assert source_of(folder) == source_of(f"{folder}:train@main") == (str(folder), "train", "main")
    assert (
        source_of(f"{folder}:test@v1") == source_of(str(source_of(f"{folder}:test@v1"))) == (str(folder), "test", "v1")
    )


def test_names_on_the_hub_are_cut_at_split_and_revision():
    assert source_of("org/name") == ("org/name", "train", "main")
    assert source_of("org/name@v1") == ("org/name", "train", "v1")
    assert source_of("org/name:test[:10]@v1") == ("org/name", "test[:10]", "v1")


def test_nothing_of_a_path_acts_on_the_terminal(tmp_path):
    file = "a\x1b[31m\u202e.jsonl"
    with pytest.raises(ValueError, match="are rejected") as raised, Rejects(tmp_path / file, 0) as rejects:
        rejects.add([reject(file, Row(1, b"{"), ValueError("x"))], 1)
        rejects.settle(1)
    assert not {"\x1b", "\u202e"} & set(str(raised.value))
    assert str(raised.value).startswith("a␛[31m⟨202E⟩.jsonl:1: x")


def test_a_json_file_that_holds_lines_is_read_as_lines(tmp_path):
    path = tmp_path / "lines.json"
    path.write_text(f"{LINE}\n{LINE}\n")
    assert [record for _, record in read_records(path)] == [PAIR, PAIR]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_was_cut_off_is_named(name, tmp_path):
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=f"{name} cannot be read to its end .* download it again"):
        list(read_records(path))


def test_a_folder_of_files_is_read_as_a_dataset_of_the_hub_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", "train.jsonl")
    assert [(row.number, row.content) for row in read_hub(str(tmp_path / "set"), "train", "main")] == [
        (1, PAIR),
        (2, PAIR),
    ]
    with pytest.raises(FileNotFoundError, match="no dataset with split 'none'"):
        list(read_hub(str(tmp_path / "set"), "none", "main"))


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (PAIR, None),
        ({"prompt": PAIR["instruction"], "response": PAIR["output"]}, None),
        ({"problem": PAIR["instruction"], "solution": PAIR["output"]}, None),
        ({"messages": MESSAGES}, None),
        ({"conversations": [{"from": "human", "value": "2 + 2 ?"}, {"from": "gpt", "value": PAIR["output"]}]}, None),
        ({"question": PAIR["instruction"], "r1": PAIR["output"]}, {"prompt": "question", "response": "r1"}),
        ({"chat": MESSAGES}, {"messages": "chat"}),
        ({"messages": [{**MESSAGES[0], "name": None}, MESSAGES[1]]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 + 2 ?"}]}, MESSAGES[1]]}, None),
    ],
)
def test_every_form_of_a_record_is_the_same_conversation(record, columns):
    assert conversation(record, columns).messages == MESSAGES


def test_tool_calls_need_no_content_and_tool_results_may_be_empty():
    messages = [
        MESSAGES[0],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": ""},
        MESSAGES[1],
    ]
    assert conversation({"messages": messages}).messages[1] == {"role": "assistant", "tool_calls": [CALL]}


def user(content) -> dict:
    return {"messages": [{"role": "user", "content": content}, MESSAGES[1]]}


BAD = {
    '{"question": "x", "output": "y"}': r"found the fields \['output', 'question'\], expected one of messages",
    '{"instruction": "x", "output": "  "}': "output is '  ', expected text that is not empty",
    '{"instruction": "x", "output": 4}': "output is 4",
    '{"instruction": "x", "output": "\\ud800"}': "is half of a surrogate pair",
    json.dumps({"messages": "hello"}): "messages is str, expected a list",
    json.dumps({"messages": ["hello"]}): r"messages\[0\] is 'hello', expected an object",
    json.dumps({"messages": [{"role": "robot", "content": "x"}]}): "role is 'robot', expected one of system, user",
    json.dumps(user("")): r"messages\[0\].content is '', expected text",
    json.dumps(user(None)): r"messages\[0\].content is None, expected text",
    json.dumps(user([{"type": "image"}])): r"messages\[0\].content is \[{'type': 'image'}\], expected text",
    json.dumps({"messages": [{"role": "assistant", "content": "x", "train": "no"}]}): "train is 'no', expected true",
    json.dumps({"messages": [{"role": "assistant", "tool_calls": [{}]}]}): "a tool call needs function.name",
    "{'instruction'": "not JSON",
    '{"instruction": "cut off': "not JSON",
    "[1, 2]": "found list, expected an object",
    f"{LINE}{LINE}": "not JSON .Extra data",
    '{"a": NaN}': "NaN is not a JSON number",
    '{"a": [1e400]}': "the number 1e400 is too large",
    '{"a": 1, "a": 2}': "'a' appears twice",
    '{"a": "\x01"}': "not JSON",
    '{"a": ' + "1" * 5000 + "}": "not JSON",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:40])
def test_a_line_that_cannot_be_used_is_named_with_what_is_wrong(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(ValueError, match=f"(?s)^{path}:2: .*{BAD[line]}"):
        for place, record in read_records(path):
            to_messages(record, place)


def test_bytes_that_are_no_utf8_are_refused():
    with pytest.raises(ValueError, match="not JSON .*codec can't decode byte 0xff"):
        parse(b'{"instruction": "\xff"}')


def test_columns_that_are_not_there_are_named():
    with pytest.raises(ValueError, match=r"found the fields \['instruction', 'output'\], but `columns` names question"):
        conversation(PAIR, {"prompt": "question", "response": "output"})


def test_an_endless_line_is_refused_and_the_lines_after_it_keep_their_numbers(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        file.write(f"{LINE}\n")
        for _ in range(65):
            file.write("x" * (1 << 20))
        file.write(f"\n{LINE}\n")
    first, endless, last = read_rows(path)
    assert (first.number, last.number) == (1, 3) and parse(last.content) == PAIR
    assert len(endless.content) == LINE_LIMIT + 1
    with pytest.raises(ValueError, match="the row has more than 64 MiB"):
        parse(endless.content)


def test_blocks_hold_every_row_once_and_end_by_records_or_bytes(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(str(10**n) for n in range(100)))
    rows = list(read_rows(path))
    cut = list(blocks(iter(rows), records=7, size=200))
    assert [row for block in cut for row in block] == rows
    assert max(map(len, cut)) == 7
    assert all(len(b) == 7 or sum(len(r.content) for r in b) >= 200 for b in cut[:-1])


def test_reading_imports_no_torch():
    code = "import sys, rsft_lib.data.worker; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "workers would take seconds to start"
