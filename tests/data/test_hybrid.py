"""Building one dataset from long and short answers to the same problems."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from real import REAL, needs_real

from rsft_lib import demo
from rsft_lib.common.artifact import verify, write_manifest
from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.data.hybrid import FINDINGS, build_hybrid
from rsft_lib.data.pairs import ROW, SHORT, THINK, balance, coverage, disagreeing, held_back, not_shorter
from rsft_lib.data.records import read_records
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.dialect import MODES
from rsft_lib.tokenizer.patch import patch_tokenizer


def think(thoughts: str, answer: str) -> str:
    return f"<think>\n{thoughts}\n</think>\n\n{answer}"


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def build(folder: Path, long: list[dict], short: list[dict] | None = None, **rules) -> dict:
    """A dataset in folder/out; by default all of it is in the training split."""
    longs = write(folder / "long.jsonl", long)
    shorts = "" if short is None else write(folder / "short.jsonl", short)
    return build_hybrid(longs, shorts, folder / "out", **{"held_out": 0, "seed": 0, **rules})


def record(problem: str, output: str, **fields) -> dict:
    return {"instruction": problem, "output": output, **fields}


def read(folder: Path, split: str = "train") -> list[dict]:
    return [found for _, found in read_records(folder / "out" / f"{split}.jsonl")]


def chosen(folder: Path) -> dict[str, str]:
    """The mode that each question is trained to choose."""
    records = [record for record in read(folder) if not record.get("mode_given")]
    assert len({record["instruction"] for record in records}) == len(records)
    return {record["instruction"]: record["mode"] for record in records}


def findings(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / FINDINGS).read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 24.\n#### 72\n", "72"),
        ("#### Step 1\nand so on", None),
        ("##### 5", None),
        ("Answer: four", "four"),
        ("**Answer**: 18 apples.", "18 apples."),
        ("**Final Answer:**\n\n18", "18"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"Answer: \boxed{5}.", "5"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{3", None),
        ("<think>\nAnswer: 3, or Answer: 4\n</think>\n\nIt is so.", None),
        ("<short>#### 72", "72"),
        ("nothing of the kind", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_that_is_marked(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,000", "1000", True), ("1000.00", "1{,}000", True), (r"\$18", "18 dollars", True), ("-3", "−3", True),
        (r"\frac{1}{2}", "0.5", True), (r"\dfrac{2}{4}", "1/2", True), (r"72\text{ clips}", "72", True),
        (r"\text{Tuesday}", "tuesday", True), ("four.", "Four", True), (r"50\%", "50%", True), ("x = 5", "5", True),
        (r"\left(3, 4\right)", "(3,4)", True), ("１２", "12", True), ("7", "8", False), ("1/3", "0.333", False),
        ("five", "four", False), ("1,00", "100", False), ("3/0", "0", False), ("12 or 13", "12", False),
    ],
)  # fmt: skip
def test_answers_are_compared_by_what_they_say(one, other, same):
    assert (normalized(one) == normalized(other)) == same


def test_answers_of_any_kind_end_soon():
    for text in (r"\boxed{" * 50_000, "Answer:*" * 50_000, "#### " + " " * 100_000, "\\" * 100_000, "9" * 100_000):
        normalized(final_answer(text) or text[:1000])
    assert normalized("9" * 5000) == "9" * 5000


def test_the_split_is_by_problem_and_a_seed_repeats_it(tmp_path):
    sources = demo.make_sources(tmp_path / "s", 50, seed=0)
    arguments = (sources / "long.jsonl", sources / "short.jsonl")
    built = build_hybrid(*arguments, tmp_path / "out", held_out=0.2, seed=3)
    build_hybrid(*arguments, tmp_path / "again", held_out=0.2, seed=3)
    build_hybrid(*arguments, tmp_path / "other", held_out=0.2, seed=4)
    train, heldout = read(tmp_path), read(tmp_path, "heldout")
    assert not {r["instruction"] for r in train} & {r["instruction"] for r in heldout}
    assert built["counts"] == {"train": {"think": 40, "short": 40}, "heldout": {"think": 10, "short": 10}}
    assert all(r["output"].startswith(MODES[r["mode"]]) for r in train)
    first, again, other = (tmp_path / name / "train.jsonl" for name in ("out", "again", "other"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert [r["mode"] for r in train] != sorted(r["mode"] for r in train)
    verify(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.jsonl", "heldout.jsonl", FINDINGS, "manifest.json",
    }  # fmt: skip


def test_a_problem_in_other_white_space_is_the_same_and_either_file_may_lack_it(tmp_path):
    longs = [record(f"What is\n\n {i}  + {i} ?", think("hm", f"Answer: {2 * i}")) for i in range(20)]
    shorts = [record(f" What is {i} + {i} ? ", str(2 * i)) for i in range(10, 30)]
    built = build(tmp_path, longs, shorts, held_out=0.5)
    assert built["problems"] == {"both": 10, "think_only": 10, "short_only": 10}
    sides = [{" ".join(r["instruction"].split()) for r in read(tmp_path, split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [15, 15]


@pytest.mark.parametrize("short_up_to", [0, 2])
def test_by_need_a_problem_is_short_where_a_short_answer_is_known_to_be_right(tmp_path, short_up_to):
    """Compared with the rule, read from the records one by one."""
    rng = random.Random(short_up_to)
    longs, shorts, expected = [], [], {}
    for i in range(200):
        problem, right = f"What is {i} + {i}?", f"Answer: {2 * i}"
        level = rng.choice([1, 2, 3, "hard", None])
        both, kind = rng.choice(["both", "long", "short"]), rng.choice(["right", "unmarked"])
        if both != "short":
            longs.append(record(problem, think("hm", right), difficulty=level))
        if both != "long":
            shorts.append(record(problem, right if kind == "right" else f"{2 * i}", difficulty=level))
        easy = not short_up_to or (isinstance(level, int) and level <= short_up_to)
        expected[problem] = {"long": "think", "short": "short"}.get(both) or (
            "short" if kind == "right" and easy else "think"
        )
    built = build(tmp_path, longs, shorts, modes="by_need", short_up_to=short_up_to)
    assert chosen(tmp_path) == expected and len(read(tmp_path)) == len(longs) + len(shorts)
    choices = {mode: n["choices"] for mode, n in built["balance"]["train"].items()}
    assert choices == Counter(expected.values())
    build_hybrid("", "", tmp_path / "again" / "out", held_out=0, seed=0, hybrid=tmp_path / "out" / "train.jsonl")
    samples = [sorted(json.dumps(r, sort_keys=True) for r in read(folder)) for folder in (tmp_path, tmp_path / "again")]
    assert samples[0] == samples[1], "built again, it trains the same choices"


def test_a_short_answer_cut_from_a_long_one_is_no_sign_that_thoughts_are_not_needed(tmp_path):
    longs = [record(f"{i} + {i} ?", think("hm", f"Answer: {2 * i}"), level=i) for i in (1, 2, 3)]
    with pytest.raises(ValueError, match="those cut from long ones do not show"):
        build(tmp_path, longs, modes="by_need")
    build(tmp_path, longs, modes="by_need", short_up_to=2, columns={"difficulty": "level"})
    assert chosen(tmp_path) == {
        "1 + 1 ?": "short",
        "2 + 2 ?": "short",
        "3 + 3 ?": "think",
    }
    build(tmp_path, longs, [record("3 + 3 ?", "Answer: 6")], cut_short=True, modes="by_need", overwrite=True)
    assert chosen(tmp_path) == {
        "1 + 1 ?": "think",
        "2 + 2 ?": "think",
        "3 + 3 ?": "short",
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"modes": "by_need", "short_up_to": 2}, "no record has a number in the field `difficulty`"),
        ({"modes": "by_need", "dialect": "qwen3"}, "in the dialect qwen3 the question chooses the mode"),
        ({"short_up_to": 2}, "is for modes 'by_need'"),
        ({"modes": "need"}, "'both' or 'by_need'"),
    ],
)
def test_what_does_not_fit_by_need_is_refused(tmp_path, rules, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, [record("1 + 1 ?", think("hm", "2"))], [record("1 + 1 ?", "2")], **rules)
    assert not (tmp_path / "out").exists()


def test_short_answers_are_cut_from_long_ones_where_none_are_given(tmp_path):
    longs = [record("1 + 1 ?", think("hm", "It is 2.\n\nAnswer: 2")), record("2 + 2 ?", think("hm", "4"))]
    assert build(tmp_path, longs)["records"] == {"read": 2, "rejected": 0, "disagreeing": 0, "cut": 2}
    cut = {r["instruction"]: r["output"] for r in read(tmp_path) if r["mode"] == "short"}
    assert cut == {"1 + 1 ?": "<short>It is 2.\n\nAnswer: 2", "2 + 2 ?": "<short>4"}

    build(tmp_path, longs, [record(" 1 + 1 ?", "two"), record("9 ?", "9")], cut_short=True, overwrite=True)
    found = {r["instruction"]: r["output"] for r in read(tmp_path) if r["mode"] == "short"}
    assert found == {" 1 + 1 ?": "<short>two", "9 ?": "<short>9", "2 + 2 ?": "<short>4"}


BAD_LONG = {
    "<think>\nhm\n\n4": "found <think>, and",
    "hm\n</think>\n\n4": "found </think>, and 'hm",
    "4": "found no tags",
    "x<think>\nhm\n</think>\n\n4": "'x<think>",
    "</think>\n<think>\n\n4": "found </think> <think>",
    "<think>a<think>b</think></think>4": "found <think> <think> </think> </think>",
    "<think>a</think>4<think>b</think>4": "found <think> </think> <think> </think>",
    "<think>a<short></think>4": "found <think> <short> </think>",
    "<think>\nhm\n</think>\n\n ": "empty answer after </think>",
    "<think>\n\n</think>\n\n4": "nothing between <think> and </think>",
    "": "expected text that is not empty",
}
BAD_SHORT = {
    "<think>hm</think>4": "must not contain <think> </think>",
    "<short><short>4": "must not contain <short>",
    "4</think>": "must not contain </think>",
}


@pytest.mark.parametrize(("answer", "kind"), [*((a, "long") for a in BAD_LONG), *((a, "short") for a in BAD_SHORT)])
def test_an_answer_that_is_not_of_its_mode_is_named_and_kept_with_the_reason(answer, kind, tmp_path):
    good = {"long": record("2 + 2 ?", think("hm", "4")), "short": record("2 + 2 ?", "4")}
    files = {name: [good[name]] + [record("bad ?", answer)] * (name == kind) for name in good}
    reason = (BAD_LONG if kind == "long" else BAD_SHORT)[answer]
    with pytest.raises(ValueError, match=rf"(?s){kind}.jsonl:2: .*{re.escape(reason)}.*1 of 3 records are rejected"):
        build(tmp_path, files["long"], files["short"])
    assert not (tmp_path / "out").exists()
    (rejected,) = map(json.loads, (tmp_path / "out.rejected.jsonl").read_text().splitlines())
    assert rejected["line"] == 2 and reason in rejected["reason"] and json.loads(rejected["record"])["output"] == answer

    assert build(tmp_path, files["long"], files["short"], reject_limit=0.4)["records"]["rejected"] == 1
    assert (tmp_path / "out.rejected.jsonl").exists()
    build(tmp_path, [good["long"]], [good["short"]])
    assert not (tmp_path / "out.rejected.jsonl").exists()  # the rejects of an earlier run are removed


def test_empty_thoughts_are_accepted_where_that_is_said(tmp_path):
    assert build(tmp_path, [record("2 ?", think("", "2"))], empty_think=True)["counts"]["train"]["think"] == 1


def test_a_pair_whose_final_answers_differ_is_dropped_and_named(tmp_path):
    longs = [record(f"{i} ?", think("hm", rf"So it is \boxed{{{1000 + i}}}.")) for i in range(4)]
    shorts = [record(f"{i} ?", f"#### 1,{i:03d}.0") for i in range(3)] + [record("3  ?", "#### 1,004")]
    built = build(tmp_path, longs, shorts)
    assert built["records"] == {"read": 8, "rejected": 0, "disagreeing": 2, "cut": 0}
    assert built["findings"] == {"final answers differ": 1} and len(read(tmp_path)) == 6
    (found,) = findings(tmp_path)
    assert [(a["place"].rpartition("/")[2], a["says"]) for a in found["answers"]] == [
        ("short.jsonl:4", "1,004"), ("long.jsonl:4", "1003"),
    ]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"1 answers disagree.*'1,004' at .*short.jsonl:4 and '1003' at .*long.jsonl:4"
    ):
        build(tmp_path, longs, shorts, on_disagreement="error")


def test_of_several_long_answers_only_those_that_nothing_supports_are_dropped(tmp_path):
    longs = [record("2 + 3 ?", think("hm", f"Answer: {said}")) for said in ("5", "5.0", "6")]
    build(tmp_path, longs, [record("2 + 3 ?", "#### 5")])
    assert Counter(r["mode"] for r in read(tmp_path)) == {"think": 2, "short": 1}
    assert not any("6" in r["output"] for r in read(tmp_path))


def test_an_answer_that_is_not_the_records_own_is_dropped_and_its_cut_copy_too(tmp_path):
    longs = [
        record("2 + 3 ?", think("hm", "Answer: 6"), answer=5),
        record("1 ?", think("hm", "Answer: 1"), answer="1.0"),
    ]
    built = build(tmp_path, longs)
    assert built["records"] == {"read": 2, "rejected": 0, "disagreeing": 1, "cut": 1}
    assert [found["finding"] for found in findings(tmp_path)] == ["the final answer is not the field `answer`"]
    assert {(r["mode"], r["answer"]) for r in read(tmp_path)} == {("think", "1.0"), ("short", "1.0")}


def test_a_final_answer_becomes_the_field_that_evaluation_reads_and_ids_are_kept(tmp_path):
    build(tmp_path, [record("2 ?", think("hm", "no mark"), id="a")], [record("3 ?", "x\n#### 3", id="b")])
    assert {r["id"]: r.get("answer") for r in read(tmp_path)} == {"a": None, "b": "3"}


def test_columns_may_name_a_field_answer_which_then_states_nothing(tmp_path):
    rows = [
        {"question": f"{i} ?", "answer": said, "id": i} for i in range(3) for said in (think("hm", "4"), "<short>4")
    ]
    columns = {"prompt": "question", "response": "answer"}
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=write(tmp_path / "all.jsonl", rows), columns=columns)
    assert built["counts"] == {"train": {"think": 3, "short": 3}}
    assert all("answer" not in r and "id" in r for r in read(tmp_path))


def test_questions_that_differ_in_tools_or_in_where_their_text_stands_are_several(tmp_path):
    def asked(said, **fields):
        return record("Colour?", f"<short>#### {said}", **fields)

    tools = [[{"type": "function", "function": {"name": name}}] for name in ("red", "blue")]
    rows = [asked("1", tools=tools[0]), asked("2", tools=tools[1]), asked("3", system="Be red."),
            record("Be red.\n\nColour?", "<short>#### 4")]  # fmt: skip
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=write(tmp_path / "all.jsonl", rows))
    assert built["records"]["disagreeing"] == 0 and len(read(tmp_path)) == 4


def test_where_there_is_one_question_it_is_said_that_none_is_held_out(tmp_path, capsys):
    build(tmp_path, [record("2 ?", think("hm", "2"))], held_out=0.5)
    assert "nothing is held out: heldout.jsonl is not written" in capsys.readouterr().out


def test_a_field_answer_that_no_answer_is_compared_with_is_named_where_another_takes_its_place(tmp_path):
    longs = [record("2 ?", think("hm", r"\boxed{4}"), answer=["4"]), record("3 ?", think("hm", "6"), answer="6")]
    assert build(tmp_path, longs)["unused_fields"] == {"answer": 1}
    assert {r["answer"] for r in read(tmp_path)} == {"4", "6"}


def test_a_short_answer_that_is_no_shorter_is_named(tmp_path):
    built = build(tmp_path, [record("2 ?", think("hm", "2"))], [record("2 ?", "2" * 100), record("2 ?", "2")])
    assert built["findings"] == {"the short answer is no shorter": 1}
    (found,) = findings(tmp_path)
    assert [a["mode"] for a in found["answers"]] == ["think", "short"]
    assert found["answers"][0]["length"] < found["answers"][1]["length"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    patch_tokenizer(demo.make_model(folder / "model", seed=0), folder / "patched", {"<|quad_start|>": "<short>"})
    return folder / "patched"


def test_the_balance_in_tokens_is_what_tokenizing_trains(tokenizer, tmp_path):
    sources = demo.make_sources(tmp_path / "s", 40, seed=0)
    built = build_hybrid(
        sources / "long.jsonl", sources / "short.jsonl", tmp_path / "out", 0.25, 1, tokenizer=tokenizer
    )
    for split, modes in built["balance"].items():
        counts = tokenize(tmp_path / "out" / f"{split}.jsonl", tokenizer, tmp_path / split)["counts"]
        answers, samples = (sum(mode[name] for mode in modes.values()) for name in ("answer", "samples"))
        assert counts["trained_tokens"] == answers + samples  # each with its EOS
    characters = build_hybrid(sources / "long.jsonl", sources / "short.jsonl", tmp_path / "out", 0.25, 1)
    assert characters["unit"] == "characters" and characters["counts"] == built["counts"]


def test_a_tokenizer_whose_control_token_is_several_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="<short> is not one token; patch it"):
        build(tmp_path, [record("2 ?", think("hm", "2"))], tokenizer=tokenizer.with_name("model"))


def test_every_record_is_written_rejected_or_disagrees(tmp_path):
    rng = random.Random(0)
    answers = ["5", "6", "#### 5", "#### 6", "#### 5.0", "<think>", "", "Answer: 6"]
    longs = [
        record(f"{rng.randrange(60)} ?", rng.choice([*BAD_LONG, *(think("hm", a) for a in answers if a)]))
        for _ in range(400)
    ]
    shorts = [record(f"{rng.randrange(60)}  ?", rng.choice(answers)) for _ in range(200)]
    for cut in (False, True):
        built = build(tmp_path, longs, shorts, cut_short=cut, reject_limit=1, held_out=0.2)
        n, written = built["records"], read(tmp_path) + read(tmp_path, "heldout")
        assert n["read"] == 600 and len(written) == n["read"] - n["rejected"] - n["disagreeing"] + n["cut"]
        assert len((tmp_path / "out.rejected.jsonl").read_text().splitlines()) == n["rejected"] > 100
        assert n["disagreeing"] > 10 and bool(n["cut"]) == cut


def random_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    rows = np.zeros(count, ROW)
    rows["mode"], rows["wrong"] = rng.random(count) < 0.5, rng.random(count) < 0.1
    rows["problem"] = rows["question"] = rng.integers(1, 20, count)
    rows["claim"] = rng.integers(0, 3, count) * 1000
    rows["claim"] += (rows["claim"] > 0) * rows["problem"]
    rows["answer"] = rng.integers(1, 30, count)
    return rows


def test_a_dataset_that_is_asked_for_again_is_kept_with_the_tokens_in_its_folder(tmp_path, capsys):
    long = [record(f"p{i}", think("a", f"Answer: {i}")) for i in range(20)]
    first = build(tmp_path, long, held_out=0.2)
    tokens = tmp_path / "out" / "Tokenized" / "text_document.bin"
    tokens.parent.mkdir()
    tokens.write_bytes(b"tokens")
    write_manifest(tokens.parent, {"made_by": "tokenize"})
    assert build(tmp_path, long, held_out=0.2).items() >= first.items()
    assert tokens.exists() and "already exists" in capsys.readouterr().out
    (tmp_path / "out" / "train.jsonl").write_text("damaged")
    for other in ({"held_out": 0.2}, {"held_out": 0.2, "seed": 1}, {"held_out": 0.2, "empty_think": True}):
        build(tmp_path, long, **other)
        assert len(read(tmp_path)) == 32 and "already exists" not in capsys.readouterr().out
    build(tmp_path, [*long, record("new", think("a", "Answer: 1"))], **other)
    assert len(read(tmp_path)) == 34 and not tokens.exists()


def test_comparing_by_columns_is_comparing_pair_by_pair():
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows = random_rows(rng, int(rng.integers(1, 60)))
        numbered = list(enumerate(rows))
        dropped = {i for i, r in numbered if r["wrong"]}
        longer = set()
        for i, mine in numbered:
            others = [o for _, o in numbered if o["problem"] == mine["problem"] and o["mode"] != mine["mode"]]
            claims = {o["claim"] for o in others if o["claim"] and not o["wrong"]}
            if mine["claim"] and claims and mine["claim"] not in claims:
                dropped.add(i)
            if mine["mode"] == SHORT and others and mine["answer"] >= min(o["answer"] for o in others):
                longer.add(i)
        found, against = disagreeing(rows)
        assert set(found.tolist()) == dropped
        for i, j in zip(found, against, strict=True):
            assert i == j or (rows["problem"][i] == rows["problem"][j] and rows["claim"][i] != rows["claim"][j])
        assert set(not_shorter(rows)[0].tolist()) == longer
        modes = {p: {r["mode"] == THINK for r in rows if r["problem"] == p} for p in rows["problem"]}
        counted = Counter(
            len(m) == 2 and "both" or (m == {True} and "think_only") or "short_only" for m in modes.values()
        )
        assert {name: n for name, n in coverage(rows).items() if n} == counted
        assert balance(rows)["think"]["answer"] == sum(int(r["answer"]) for r in rows if r["mode"] == THINK)
        held = held_back(rows, 0.3, seed=1)
        assert not set(rows["problem"][held]) & set(rows["problem"][~held])


@pytest.mark.parametrize("rules", [{"held_out": 1}, {"held_out": -0.1}, {"on_disagreement": "keep"}])
def test_rules_that_make_no_sense_are_refused(rules, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        build(tmp_path, [record("2 ?", think("hm", "2"))], **rules)


# Datasets that are ready, and plain ones


def ready(folder: Path, records: list[dict], name: str) -> Path:
    """Records as a file of the format given by its name."""
    path = folder / name
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for found in records for name in found)
        table = pyarrow.table({name: [found.get(name) for found in records] for name in names})
        pyarrow.parquet.write_table(table, path)
    elif name == "list.json":
        path.write_text(json.dumps(records, indent=2))
    else:
        write(path, records)
    return path


KINDS = ["list.json", "lines.json", "lines.jsonl", "ready.parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_that_has_both_modes_is_built_as_its_two_halves_are(kind, tokenizer, tmp_path):
    longs = [record(f"{i} + {i} ?", think("hm", f"Answer: {2 * i}")) for i in range(40)]
    shorts = [record(f"{i} + {i} ?", f"Answer: {2 * i + (i == 7)}") for i in range(40)]
    halves = build(tmp_path, longs, shorts, held_out=0.2)
    expected = {name: sorted(map(str, read(tmp_path, name))) for name in ("train", "heldout")}
    both = [
        found
        for pair in zip(longs, ({**s, "output": f"<short>{s['output']}"} for s in shorts), strict=True)
        for found in pair
    ]
    data = ready(tmp_path, both, kind)
    built = build_hybrid("", "", tmp_path / "out", 0.2, 0, hybrid=data, overwrite=True)
    assert {name: sorted(map(str, read(tmp_path, name))) for name in ("train", "heldout")} == expected
    for fact in ("records", "problems", "findings", "balance", "counts"):
        assert built[fact] == halves[fact], fact
    assert built["records"]["disagreeing"] == 2 and built["records"]["read"] == 80
    counts = tokenize(tmp_path / "out" / "train.jsonl", tokenizer, tmp_path / "tokens")["modes"]
    assert {mode: n["written"] for mode, n in counts.items()} == built["counts"]["train"]
    assert tokenize(data, tokenizer, tmp_path / "direct")["counts"]["written"] == 80


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_dataset_is_of_one_mode_and_split_by_question_too(kind, tokenizer, tmp_path):
    rows = [record(f"{i // 2} ?", f"It is {i}.") for i in range(40)]
    built = build_hybrid("", "", tmp_path / "out", 0.25, 0, hybrid=ready(tmp_path, rows, kind), tokenizer=tokenizer)
    assert built["counts"] == {"train": {"other": 30}, "heldout": {"other": 10}} and built["problems"] == {"other": 20}
    sides = [read(tmp_path, split) for split in ("train", "heldout")]
    assert not {r["instruction"] for r in sides[0]} & {r["instruction"] for r in sides[1]}
    assert all(r["mode"] == "other" for side in sides for r in side)
    modes = tokenize(tmp_path / "out" / "train.jsonl", tokenizer, tmp_path / "tokens")["modes"]
    assert modes.keys() == {"other"} and modes["other"]["written"] == 30


def test_where_answers_declare_their_mode_one_that_does_not_is_rejected(tmp_path):
    rows = [record("1 ?", "<short>1"), record("2 ?", think("hm", "2")), record("3 ?", "3"), record("4 ?", "x <think>")]
    path = write(tmp_path / "data.jsonl", rows)
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=path, reject_limit=0.5)
    assert built["records"] == {"read": 4, "rejected": 2, "disagreeing": 0, "cut": 0} and len(read(tmp_path)) == 2
    rejects = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    reasons = {row["line"]: row["reason"] for row in rejects}
    assert "begins with neither <think> nor <short>, as 2 others of this dataset do" in reasons[3]
    assert "contains <think> but begins with" in reasons[4]
    with pytest.raises(ValueError, match="2 of 4 records are rejected"):
        build_hybrid("", "", tmp_path / "other", 0, 0, hybrid=path)


def test_what_comes_before_an_answer_is_kept_and_makes_another_problem(tokenizer, tmp_path):
    rows = [
        record("Sum.", "<short>5", input="2, 3"), record("Sum.", "<short>9", input="4, 5"),
        record("And now?", "<short>C", system="Be strict.", history=[["hi", "<short>hello"]]),
        {"messages": [{"role": "user", "content": "2 ?"}, {"role": "assistant", "content": "2", "reasoning": "hm"}]},
        record("Call.", "<short>done", tools=[{"name": "add"}], note="seen"),
    ]  # fmt: skip
    data = write(tmp_path / "data.jsonl", rows)
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=data)
    found = {r["output"]: r for r in read(tmp_path)}
    assert found["<short>5"]["instruction"] == "Sum.\n2, 3" and found["<short>9"]["instruction"] == "Sum.\n4, 5"
    assert found["<short>C"]["system"] == "Be strict." and found["<short>C"]["history"] == [["hi", "<short>hello"]]
    assert found["<think>\nhm\n</think>\n\n2"]["mode"] == "think" and found["<short>done"]["tools"] == [{"name": "add"}]
    assert built["problems"] == {"both": 0, "think_only": 1, "short_only": 4}
    assert built["unused_fields"] == {"note": 1}
    texts = []
    for name, path in (("built", tmp_path / "out" / "train.jsonl"), ("direct", data)):
        tokenize(path, tokenizer, tmp_path / name, workers=0)
        store = TokenStore(tmp_path / name)
        texts.append(sorted(tuple(part.tobytes() for part in store[i]) for i in range(len(store))))
    assert texts[0] == texts[1] and len(texts[0]) == 5


def test_answers_to_one_question_stay_on_one_side_also_with_other_system_prompts(tmp_path):
    rows = [record(f"{i} ?", f"<short>{s}", system=s) for i in range(30) for s in ("A", "B")]
    built = build_hybrid("", "", tmp_path / "out", 0.5, 1, hybrid=write(tmp_path / "data.jsonl", rows))
    sides = [{r["instruction"] for r in read(tmp_path, split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1] and built["problems"]["short_only"] == 60


UNUSABLE = {
    "an answer that is only a call": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": {}}}]}]}, "an answer calls a tool; notebook 04 accepts such",
    ),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "found the roles user; expected alternating"),
    "an infinite answer": ('{"instruction": "x", "output": "<short>y", "answer": Infinity}', "not a JSON number"),
    "an id that is half a character": (record("x", "<short>y", id="\ud800"), "cannot be written as JSON"),
    "an empty short answer": (record("x", "<short> "), "empty answer after <short>"),
    "a number": (4, "found int, expected an object"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_record_that_raises_anything_is_rejected_and_the_others_are_built(name, tmp_path):
    row, reason = UNUSABLE[name]
    lines = [json.dumps(record("1 ?", "<short>1")), row if isinstance(row, str) else json.dumps(row)]
    (tmp_path / "data.json").write_text(f"[{','.join(lines)}]")
    built = build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=tmp_path / "data.json", reject_limit=0.5)
    (rejected,) = map(json.loads, (tmp_path / "out.rejected.jsonl").read_text().splitlines())
    assert built["records"]["rejected"] == 1 and rejected["line"] == 2 and reason in rejected["reason"]


def test_an_input_that_holds_no_records_is_named(tmp_path):
    good, empty = write(tmp_path / "good.jsonl", [record("2 ?", think("hm", "2"))]), write(tmp_path / "empty.jsonl", [])
    for inputs, message in [
        ((good, empty), "short answers: .*empty.jsonl contains no records"),
        ((empty, ""), "long answers: .*empty.jsonl contains no records"),
        ((good, good), "(?s)a short answer must not contain.*1 of 2 records"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_hybrid(*inputs, tmp_path / "out", 0, 0)
    with pytest.raises(ValueError, match="short answers: all 1 records of .*good.jsonl are rejected"):
        build_hybrid(good, good, tmp_path / "out", 0, 0, reject_limit=1)
    with pytest.raises(ValueError, match="cut_short is for `long`"):
        build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=good, cut_short=True)
    assert not (tmp_path / "out").exists()


@needs_real
def test_problems_that_differ_in_their_input_alone_are_two(tmp_path):
    cases = Path(REAL).parent / "cases" / "hybrid"
    built = build_hybrid(cases / "long_with_input.jsonl", cases / "short_with_input.jsonl", tmp_path / "out", 0, 0)
    assert built["problems"] == {"both": 3, "think_only": 0, "short_only": 0}
    assert built["records"] == {"read": 6, "rejected": 0, "disagreeing": 0, "cut": 0}


def test_nothing_left_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no sample is left: 2 of 2 are dropped"):
        build(tmp_path, [record("2 ?", think("hm", "Answer: 2"))], [record("2 ?", "Answer: 3")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.jsonl", "short.jsonl"]


@needs_real
def test_real_traces_and_solutions_pass_and_what_is_spoilt_is_found(tmp_path):
    data = Path(REAL) / "data"
    long, short = data / "long_planbench_r1.jsonl.gz", data / "short_gsm8k_train.jsonl"
    built = build_hybrid(long, short, tmp_path / "out", 0.1, 1, cut_short=True)
    assert built["records"] == {"read": 364 + 7473, "rejected": 0, "disagreeing": 0, "cut": 364}
    assert built["problems"] == {"both": 364, "think_only": 0, "short_only": 7473}
    assert sum("answer" in r for r in read(tmp_path)) > 6000  # GSM8K's `#### x`

    solutions = [found for _, found in read_records(short)][:300]
    traces = [r | {"response": think("hm", r["response"].replace("#### ", "Answer: $") + " in all")} for r in solutions]
    wrong = random.Random(0).sample(range(300), 20)
    for i in wrong:
        traces[i]["response"] = think("hm", "Answer: 123,456")
    built = build(tmp_path, traces, solutions, overwrite=True)
    assert built["records"]["disagreeing"] == 40 and built["findings"]["final answers differ"] == 20
    named = [f["answers"][0]["place"] for f in findings(tmp_path) if f["finding"] == "final answers differ"]
    assert sorted(int(place.rpartition(":")[2]) - 1 for place in named) == sorted(wrong)
