"""How every field of a row is converted, tokenized and built into a dataset."""

import json
import re
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from real import REAL, needs_real
from transformers.utils import chat_template_utils

from rsft_lib import demo
from rsft_lib.data.conversation import RULES, conversation
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.records import read_hub
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

BOS, EOS, USER, ASSISTANT = demo.BOS, demo.EOS, "<｜User｜>", "<｜Assistant｜>"
ASKED = [{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": "<short>4"}]
GOOD = {"messages": ASKED}


def call(arguments, name="add", **extra) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def calling(arguments, name="add", **extra) -> dict:
    """A chat with a tool call."""
    asks = {"role": "assistant", "content": None, "tool_calls": [call(arguments, name, **extra)]}
    return {"messages": [ASKED[0], asks, {"role": "tool", "content": "4"}, ASKED[1]]}


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    patch_tokenizer(demo.make_model(folder / "model", seed=0), folder / "patched", {"<|quad_start|>": "<short>"})
    return folder / "patched"


class Tokenized:
    """The result of tokenizing rows: texts, trained parts, rejects by line, and the manifest."""

    def __init__(self, data: Path, tokenizer: Path, **options):
        out = data.with_name(f"{data.name}-tokens")
        self.facts = tokenize(data, tokenizer, out, workers=0, reject_limit=0.99, **options)
        store, loaded = TokenStore(out), load_tokenizer(tokenizer)
        self.texts = [loaded.decode(store[i][0]) for i in range(len(store))]
        self.trained = [loaded.decode(store[i][0][store[i][1] > 0]) for i in range(len(store))]
        path = out.with_name(f"{out.name}.rejected.jsonl")
        rejects = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        self.rejects = {row["line"]: row["reason"] for row in rejects}


def write(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        pyarrow.parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# Fields that hold text


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_the_fields_of_alpaca_are_all_in_the_text(patched, tmp_path, name):
    rows = [
        {"instruction": "Sum.", "input": "2, 3", "output": "<short>5"},
        {"instruction": "Sum.", "input": "", "output": "<short>0", "system": "Be brief."},
        {"instruction": "And now?", "input": None, "output": "<short>6", "history": [["Sum 2, 3.", "5"]]},
    ]
    found = Tokenized(write(tmp_path, rows, name), patched)
    assert found.texts == [
        f"{BOS}{USER}Sum.\n2, 3{ASSISTANT}<short>5{EOS}",
        f"{BOS}Be brief.{USER}Sum.{ASSISTANT}<short>0{EOS}",
        f"{BOS}{USER}Sum 2, 3.{ASSISTANT}5{EOS}{USER}And now?{ASSISTANT}<short>6{EOS}",
    ]
    assert found.facts["unused_fields"] == {}


@pytest.mark.parametrize("field", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_messages_is_the_first_message(patched, tmp_path, field):
    chat = [{"from": "user", "value": "2 + 2 ?"}, {"from": "assistant", "value": "<short>4"}]
    within = [{"role": "system", "content": "Be brief."}, *ASKED]
    rows = [{field: "Be brief.", "conversations": chat}, {field: "Be brief.", "messages": ASKED},
            {field: "Be brief.", "messages": within}]  # fmt: skip
    found = Tokenized(write(tmp_path, rows), patched)
    assert found.texts == [f"{BOS}Be brief.{USER}2 + 2 ?{ASSISTANT}<short>4{EOS}"] * 3


def test_what_is_not_used_is_counted_and_named(patched, tmp_path):
    rows = [
        {**GOOD, "id": 7, "source": "web", "empty": "", "none": None, "list": []},
        {**GOOD, "source": "book", "instruction": "never read"},
        {"messages": [{**ASKED[0], "context": "a page"}, {**ASKED[1], "name": "bot"}]},
    ]
    found = Tokenized(write(tmp_path, rows), patched)
    expected = {"id": 1, "source": 2, "instruction": 1, "messages[].context": 1, "messages[].name": 1}
    assert len(found.texts) == 3 and found.facts["unused_fields"] == expected


def test_a_field_of_a_message_that_the_chat_template_leaves_out_is_named(patched, tmp_path):
    asked, answered = calling({"a": 2})["messages"][:2], ASKED[1]
    tool = {"role": "tool", "content": "4", "name": "adder", "tool_call_id": "call_17"}
    rows = [
        {"messages": [{**ASKED[0], "name": "Alice"}, {**answered, "name": "short"}]},  # the word is in the text
        {"messages": [*asked, tool, answered]},
        {"messages": [{**ASKED[0], "reasoning_content": "hm", "tool_calls": [call({"a": 2})]}, answered]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2 ?", "citations": [1]}]}, answered]},
    ]
    asked[1]["tool_calls"][0] |= {"id": "call_17"}
    asked[1]["tool_calls"][0]["function"] |= {"strict": True}
    found = Tokenized(write(tmp_path, rows), patched)
    expected = {"name": 2, "tool_call_id": 1, "reasoning_content": 1, "tool_calls": 1}
    expected |= {"tool_calls[].id": 1, "tool_calls[].function.strict": 1, "content[].citations": 1}
    assert len(found.texts) == 4
    assert found.facts["unused_fields"] == {f"messages[].{name}": count for name, count in expected.items()}
    built = build_hybrid("", "", tmp_path / "built", 0, 0, hybrid=tmp_path / "rows.jsonl", reject_limit=0.99)
    assert built["counts"] == {"train": {"think": 0, "short": 3}}
    expected = {"name": 1, "reasoning_content": 1, "tool_calls": 1, "content[].citations": 1}
    assert built["unused_fields"] == {f"messages[].{name}": count for name, count in expected.items()}


def test_of_two_spellings_of_a_key_the_empty_one_goes_and_two_texts_are_refused(patched, tmp_path):
    answered = {"from": "gpt", "value": "<short>4", "content": ""}
    rows = [{"conversations": [ask, answered]} for ask in (
        {"from": "human", "value": "2 + 2 ?", "content": "2 + 2 ?", "role": None},
        {"from": "human", "content": "", "value": "2 + 2 ?"},
        {"from": "human", "value": "2 + 2 ?", "content": "never read"},
        {"from": "human", "role": "system", "value": "2 + 2 ?"},
    )]  # fmt: skip
    found = Tokenized(write(tmp_path, rows), patched)
    assert found.texts == [f"{BOS}{USER}2 + 2 ?{ASSISTANT}<short>4{EOS}"] * 2
    assert sorted(found.rejects) == [3, 4] and "has content and value, and they differ" in found.rejects[3]


def test_a_second_chain_of_thought_is_named_or_refused(patched, tmp_path):
    both = {"role": "assistant", "content": "4", "reasoning_content": "two and two", "thinking": "a second"}
    rows = [{"messages": [ASKED[0], both]}, {"messages": [ASKED[0], {**both, "thinking": "two and two"}]},
            {"messages": [ASKED[0], {**both, "thinking": None, "content": "<think>\nhm\n</think>\n\n4"}]}]  # fmt: skip
    found = Tokenized(write(tmp_path, rows), patched)
    assert found.trained == [f"<think>\ntwo and two\n</think>\n\n4{EOS}"] and sorted(found.rejects) == [1, 3]
    assert "<think> </think> in its content and also a separate chain of thought; keep one" in found.rejects[3]
    built = build_hybrid("", "", tmp_path / "built", 0, 0, hybrid=tmp_path / "rows.jsonl", reject_limit=0.99)
    assert built["unused_fields"] == {"messages[].thinking": 1} and built["records"]["rejected"] == 1


def test_no_control_token_is_trained_behind_a_chain_of_thought_of_its_own_field(patched, tmp_path):
    rows = [{"messages": [ASKED[0], {"role": "assistant", "content": content, "reasoning_content": thoughts}]}
            for content, thoughts in (("<short>4", "two and two"), ("<short>4", " \n"))]  # fmt: skip
    found = Tokenized(write(tmp_path, rows), patched)
    assert found.trained == [f"<short>4{EOS}"] and list(found.rejects) == [1]
    assert "messages[1] has <short> in its content and also a separate chain of thought" in found.rejects[1]


def test_what_was_made_by_other_rules_is_made_again(patched, tmp_path, monkeypatch):
    """As after an update that fixes the conversion of rows: outputs of the old version must be rebuilt."""
    data = write(tmp_path, [GOOD])
    with monkeypatch.context() as before:
        for module in ("tokenize", "hybrid"):
            before.setattr(f"rsft_lib.data.{module}.RULES", 1)
        tokenize(data, patched, tmp_path / "tokens", workers=0)
        build_hybrid("", "", tmp_path / "built", 0, 0, hybrid=data)
    assert tokenize(data, patched, tmp_path / "tokens", workers=0)["rules"] == RULES
    assert build_hybrid("", "", tmp_path / "built", 0, 0, hybrid=data)["rules"] == RULES


def test_columns_rename_fields_and_leave_the_others_what_they_are(patched, tmp_path):
    row = {"q": "2 + 2 ?", "a": "<short>4", "system": "Be brief.", "prompt": "other", "tag": "x"}
    found = Tokenized(write(tmp_path, [row]), patched, columns={"prompt": "q", "response": "a"})
    assert found.texts == [f"{BOS}Be brief.{USER}2 + 2 ?{ASSISTANT}<short>4{EOS}"]
    assert found.facts["unused_fields"] == {"prompt": 1, "tag": 1}


def test_a_chain_of_thought_in_a_field_of_its_own_is_trained_whatever_it_is_called(patched, tmp_path, monkeypatch):
    # Recent versions of transformers translate the names for the template, older ones do not.
    monkeypatch.setattr(chat_template_utils, "_alias_reasoning_fields", lambda chat: chat, raising=False)
    rows = [{"messages": [ASKED[0], {"role": "assistant", "content": "4", name: "two and two"}]}
            for name in ("reasoning_content", "reasoning", "thinking")]  # fmt: skip
    assert Tokenized(write(tmp_path, rows), patched).trained == [f"<think>\ntwo and two\n</think>\n\n4{EOS}"] * 3


# Arrow's padding


def test_null_that_arrow_added_is_not_trained_and_null_that_json_wrote_is(patched, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tool = {"type": "function", "function": {"name": "add", "parameters": {"b": {"x": 1}}}}
    rows = [calling({"city": "Paris"}), calling({"a": 2, "b": [{"c": 1}, {"d": 2}]}), {**GOOD, "tools": [tool]},
            {**GOOD, "tools": [{**tool, "function": {"name": "mul", "parameters": {"a": {"y": 1}}}}]}]  # fmt: skip
    plain = Tokenized(write(tmp_path, rows), patched).texts
    assert Tokenized(write(tmp_path, rows, "rows.parquet"), patched).texts == plain
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", rows, "train.parquet")
    contents = [row.content for row in read_hub(str(tmp_path / "set"), "train", "main")]
    assert [conversation(content)[:2] for content in contents] == [conversation(row)[:2] for row in rows]
    (text,) = Tokenized(write(tmp_path, [calling({"city": None})], "null.jsonl"), patched).texts
    assert '{"city": null}' in text and not any("null" in text for text in plain)


@needs_real
def test_the_same_chats_from_parquet_and_from_lines_are_the_same_tokens(patched, tmp_path):
    cases = Path(REAL).parent / "cases" / "rows"
    texts = []
    for suffix in (".jsonl", ".parquet"):
        path = tmp_path / f"tools{suffix}"
        path.write_bytes((cases / f"tool_arguments{suffix}").read_bytes())
        texts.append(Tokenized(path, patched).texts)
    assert texts[0] == texts[1] and len(texts[0]) == 2


# Rows that would train something other than they show

REFUSED = {
    "a part that is null": (
        {"messages": [ASKED[0], {"role": "assistant", "content": [{"type": "text", "text": None}]}]},
        "messages[1].content is [{'type': 'text', 'text': None}], expected text",
    ),
    "a part that is an object": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"a": 1}}]}, ASKED[1]]},
        "messages[0].content is [{'type': 'text', 'text': {'a': 1}}], expected text",
    ),
    "a tag in arguments": (calling({"text": "a <think> b"}), "messages[1].tool_calls: the text contains '<think>'"),
    "a tag in arguments as text": (calling('{"text": "</think>"}'), "the text contains '</think>' at character 10"),
    "a tag as an argument's name": (calling({"<short>": 1}), "the text contains '<short>'"),
    "a tag in a function's name": (calling({}, "<short>"), "the text contains '<short>'"),
    "a tag in a chain of thought": (
        {"messages": [ASKED[0], {"role": "assistant", "content": "4", "reasoning_content": "a </think> b"}]},
        "messages[1].reasoning_content: the text contains '</think>' at character 2",
    ),
    "arguments that are neither": (calling([1]), "function.arguments is [1], expected an object or a JSON string"),
    "a tool that is none": ({**GOOD, "tools": ["add"]}, "tools[0] is 'add', expected an object"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "ONE"}, {"role": "system", "content": "TWO"}, *ASKED]},
        "the chat template refuses this conversation: a system message must be the first of the conversation",
    ),
    "a late system prompt": (
        {"messages": [*ASKED, {"role": "system", "content": "LATE"}, *ASKED]},
        "a system message must be the first of the conversation",
    ),
    "a system prompt beside another": (
        {"system": "ONE", "messages": [{"role": "system", "content": "TWO"}, *ASKED]},
        "a system message must be the first of the conversation",
    ),
    "a role that is a list": ({"messages": [{"role": ["user"], "content": "x"}, ASKED[1]]}, "role is ['user'], ex"),
    "a role that is an object": ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "role is {'a': 1}, expected"),
    "a weight of 4,000 digits": ({"messages": [ASKED[0], {**ASKED[1], "weight": 10**4000}]}, "weight is 1000"),
    "half a character in tools": ({**GOOD, "tools": [{"description": "\ud83d"}]}, "tools: '\\ud83d' at character 0"),
    "half a character in thoughts": (
        {"messages": [ASKED[0], {**ASKED[1], "reasoning_content": "x\ud83d"}]}, "half of a surrogate pair",
    ),
    "half a character in a call's id": (calling({}, id="\ud800"), "half of a surrogate pair"),
    "a history that is none": ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0] is ['a'], ex"),
    "an input that is none": ({"instruction": "x", "output": "y", "input": 4}, "input is 4, expected text"),
    "a number": (4, "found int, expected an object"),
    "nothing": (None, "found NoneType, expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_row_is_rejected_and_its_neighbours_are_not(name, patched, tmp_path):
    row, reason = REFUSED[name]
    for file in ("rows.jsonl", "rows.json"):
        found = Tokenized(write(tmp_path, [GOOD, row, GOOD], file), patched)
        assert found.rejects.keys() == {2} and reason in found.rejects[2], found.rejects
        assert found.texts[0] == found.texts[-1] == f"{BOS}{USER}2 + 2 ?{ASSISTANT}<short>4{EOS}"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_deep_nesting_is_trained_or_rejects_only_its_row(patched, tmp_path, name, depth):
    """A depth of 100 is trained; the maximum depth depends on the Python version."""
    good, nest = json.dumps(GOOD), '{"a": ' * depth + "1" + "}" * depth
    rows = [good, f'{good[:-1]}, "tools": [{nest}]}}', good]
    (tmp_path / name).write_text(f"[{','.join(rows)}]" if name == "rows.json" else "\n".join(rows))
    found = Tokenized(tmp_path / name, patched)
    if depth == 100 or not found.rejects:
        assert found.rejects == {} and nest in found.texts[1] and len(found.texts) == 3
    else:
        assert found.rejects.keys() == {2} and "maximum recursion depth exceeded" in found.rejects[2]
    assert found.texts[0] == found.texts[-1] == f"{BOS}{USER}2 + 2 ?{ASSISTANT}<short>4{EOS}"


def test_a_message_is_looked_for_at_its_place_and_not_in_another_message(patched, tmp_path):
    """The template leaves out every system message after the first."""
    template = (patched / "chat_template.jinja").read_text()
    shorter = re.sub(r"\{\{- raise_exception\('a ' \+ message.role.*?\}\}", "", template)
    assert shorter != template
    (tmp_path / "own.jinja").write_text(shorter)
    forgetful = tmp_path / "forgetful"
    patch_tokenizer(patched, forgetful, {"<|quad_start|>": "<short>"}, template=tmp_path / "own.jinja")
    rows = [{"messages": [{"role": "system", "content": "2"}, {"role": "system", "content": "Be brief."}, *ASKED]}]
    assert "message 1 (system)" in Tokenized(write(tmp_path, [GOOD, *rows]), forgetful).rejects[2]


# What Parquet has and JSON has not


def test_dates_decimals_and_years_that_python_has_not_cost_their_row_at_most(patched, tmp_path):
    days = pyarrow.array([0, 2**31 - 1, 0], pyarrow.date32())  # the second is in the year 5,881,580
    table = pyarrow.Table.from_pylist([{"instruction": f"{i} ?", "output": "<short>Answer: 4"} for i in range(3)])
    table = table.append_column("id", days)
    table = table.append_column("answer", pyarrow.array([Decimal("4.0"), None, Decimal(5)], pyarrow.decimal128(5, 1)))
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = Tokenized(tmp_path / "rows.parquet", patched)
    assert len(found.texts) == 2 and "the row cannot be read" in found.rejects[2]
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=tmp_path / "rows.parquet", reject_limit=0.5)
    (line,) = (tmp_path / "out" / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == str(date(1970, 1, 1)) and json.loads(line)["answer"] == "4.0"
    assert built["records"] == {"read": 3, "rejected": 1, "disagreeing": 1, "cut": 0}


# Nothing to read


def test_blank_lines_are_not_records_and_an_empty_file_says_so(patched, tmp_path):
    found = Tokenized(write(tmp_path, ["", GOOD, "  ", GOOD, "", "x"]), patched)
    assert found.facts["counts"]["records"] == 3 and found.rejects.keys() == {6}
    for empty in ([], ["", " "]):
        with pytest.raises(ValueError, match="empty.jsonl contains no records"):
            tokenize(write(tmp_path, empty, "empty.jsonl"), patched, tmp_path / "out", workers=0)
    with pytest.raises(ValueError, match="all 2 records are rejected"):
        tokenize(write(tmp_path, ["x", "y"], "bad.jsonl"), patched, tmp_path / "out", workers=0, reject_limit=1)
    assert not (tmp_path / "out").exists()
