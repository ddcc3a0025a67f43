"""Building datasets in Qwen3's dialect, from sources in any form."""

import json
from pathlib import Path

import pytest

from rsft_lib import demo
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.records import read_records
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.patch import patch_tokenizer

EMPTY = "<think>\n\n</think>\n\n"


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in rows))
    return path


def build(folder: Path, dialect: str = "qwen3", **given) -> tuple[dict, list[tuple[str, str, str]]]:
    """(manifest, the rows as (question, answer, mode), sorted) of a dataset without held-out questions."""
    inputs = {name: write(folder / f"{name}.jsonl", rows) for name, rows in given.items() if isinstance(rows, list)}
    options = {name: value for name, value in given.items() if not isinstance(value, list)}
    arguments = {"long": "", "short": "", "held_out": 0, "seed": 0, "dialect": dialect, **options, **inputs}
    built = build_hybrid(folder=folder / f"out-{dialect}", **arguments)
    rows = [row for _, row in read_records(folder / f"out-{dialect}" / "train.jsonl")]
    return built, sorted((row["instruction"], row["output"], row["mode"]) for row in rows)


def test_long_and_short_answers_are_written_in_qwen3s_form(tmp_path):
    """Whatever the white space of the sources; a short source may already have the empty block or <short>."""
    built, rows = build(
        tmp_path,
        long=[("1 + 1 ?", "<think>\nhm\n</think>\n\n2"), ("2 + 2 ?", "<think> so\n\nthen</think> 4\n")],
        short=[("1 + 1 ?", "2"), ("2 + 2 ?", EMPTY + "4"), ("3 + 3 ?", "<short> 6"), ("4 + 4 ?", "<think></think>\n8")],
    )
    assert rows == [
        ("1 + 1 ? /no_think", EMPTY + "2", "short"), ("1 + 1 ? /think", "<think>\nhm\n</think>\n\n2", "think"),
        ("2 + 2 ? /no_think", EMPTY + "4", "short"), ("2 + 2 ? /think", "<think>\nso\n\nthen\n</think>\n\n4\n", "think"),  # noqa: E501
        ("3 + 3 ? /no_think", EMPTY + "6", "short"), ("4 + 4 ? /no_think", EMPTY + "8", "short"),
    ]  # fmt: skip
    assert built["problems"] == {"both": 2, "think_only": 0, "short_only": 2}, "the switch is not part of the problem"


def test_short_answers_cut_from_long_ones_ask_for_no_thoughts(tmp_path):
    _, rows = build(tmp_path, long=[("1 + 1 ? /think", "<think>\nhm\n</think>\n\n2")])
    assert rows == [
        ("1 + 1 ? /no_think", EMPTY + "2", "short"),
        ("1 + 1 ? /think", "<think>\nhm\n</think>\n\n2", "think"),
    ]


HYBRIDS = {
    "thinkless": [("1 + 1 ?", "<think>\nhm\n</think>\n\n2"), ("1 + 1 ?", "<short>2")],
    "qwen3": [("1 + 1 ? /think", "<think>\nhm\n</think>\n\n2"), ("1 + 1 ? /no_think", EMPTY + "2")],
    "qwen3 without switches": [("1 + 1 ?", "<think>\nhm\n</think>\n\n2"), ("1 + 1 ?", EMPTY + "2")],
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_dataset_in_either_dialect_becomes_one_in_qwen3s(tmp_path, name):
    built, rows = build(tmp_path, hybrid=HYBRIDS[name])
    assert [row[:2] for row in rows] == sorted(HYBRIDS["qwen3"])
    assert built["counts"] == {"train": {"think": 1, "short": 1}} and built["problems"]["both"] == 1


def test_what_contradicts_itself_or_has_no_mode_is_rejected(tmp_path):
    bad = [
        ("a /no_think", "<think>\nhm\n</think>\n\n2"),
        ("b /think", EMPTY + "2"),
        ("c", "plain"),
        ("d /think", "plain"),
    ]
    built, rows = build(tmp_path, hybrid=[*HYBRIDS["qwen3"], *bad], reject_limit=1)
    assert len(rows) == 2 and built["records"]["rejected"] == 4
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out-qwen3.rejected.jsonl").read_text().splitlines()]
    assert "asks for mode short, but the answer is in mode think" in reasons[0]
    assert "asks for mode think, but the answer is in mode short" in reasons[1]
    assert any("does not begin with <think>, as 2 others" in reason for reason in reasons)
    assert any("asks for mode think, but the answer is in mode other" in reason for reason in reasons)


def test_a_long_answer_without_thoughts_is_no_long_answer(tmp_path):
    with pytest.raises(ValueError, match="empty chain of thought is the short mode"):
        build(tmp_path, long=[("a", EMPTY + "2")], empty_think=True)
    with pytest.raises(ValueError, match="rejected"):
        build(tmp_path, long=[("a", EMPTY + "2")], reject_limit=1)
    with pytest.raises(ValueError, match="dialect is 'qwen'; choose one of thinkless, qwen3"):
        build(tmp_path, "qwen", long=[("a", "<think>\nhm\n</think>\n\n2")])


EARLIER = [
    ("Hi", "<think>x</think>Hi"), ("How?", "<short>So"), ("Plain?", "Plain"), ("a /no_think", EMPTY + "b"),
    ("Cut?", "<think>hm"),
]  # fmt: skip
IN_QWEN3 = [
    ["Hi /think", "<think>\nx\n</think>\n\nHi"], ["How? /no_think", EMPTY + "So"], ["Plain?", "Plain"],
    ["a /no_think", EMPTY + "b"], ["Cut?", "<think>hm"],
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "expected"), [("qwen3", IN_QWEN3), ("thinkless", [list(t) for t in EARLIER])])
def test_earlier_turns_are_written_in_the_dialect_where_their_answers_are_in_a_mode(tmp_path, dialect, expected):
    rows = [{"instruction": "1 + 1 ?", "output": "<short>2", "history": [list(turn) for turn in EARLIER]}]
    (tmp_path / "chats.jsonl").write_text(json.dumps(rows[0]) + "\n")
    build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=tmp_path / "chats.jsonl", dialect=dialect)
    ((_, row),) = read_records(tmp_path / "out" / "train.jsonl")
    assert row["history"] == expected


def test_a_dataset_is_not_tokenized_in_another_dialect(tmp_path):
    patch_tokenizer(demo.make_model(tmp_path / "model", 0), tmp_path / "tokenizer", {"<|quad_start|>": "<short>"})
    for dialect, other in (("qwen3", "thinkless"), ("thinkless", "qwen3")):
        build(tmp_path, dialect, hybrid=HYBRIDS["thinkless"])
        data = tmp_path / f"out-{dialect}" / "train.jsonl"
        with pytest.raises(ValueError, match=f"was built for the dialect {dialect}, but dialect is '{other}'"):
            tokenize(data, tmp_path / "tokenizer", tmp_path / "tokens", workers=0, dialect=other)
        assert not (tmp_path / "tokens").exists()
        (tmp_path / "manifest.json").write_text('{"of": "another tool"}')  # beside a file that is not of this kit
        lone = tmp_path / "lone.jsonl"
        lone.write_bytes(data.read_bytes())
        facts = tokenize(data, tmp_path / "tokenizer", tmp_path / dialect, workers=0, dialect=dialect)
        assert {mode: n["written"] for mode, n in facts["modes"].items()} == {"think": 1, "short": 1}
        again = tokenize(lone, tmp_path / "tokenizer", tmp_path / f"lone-{dialect}", workers=0, dialect=dialect)
        assert again["modes"] == facts["modes"]
