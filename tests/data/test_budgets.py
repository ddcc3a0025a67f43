"""Cut chains of thought: where they are cut, what of them is trained, and how many there are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from model_templates import TEMPLATES
from real import REAL, needs_real
from tokenizers import AddedToken

from rsft_lib import demo
from rsft_lib.data.budgets import Budgets, cut_answers
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.records import read_records
from rsft_lib.data.span_kinds import MODE_NAMES, SPAN_NAMES, control_tokens, kinds
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.display.data.dataset import budgets_table
from rsft_lib.display.data.sample_stats import measure
from rsft_lib.display.mask.sample import show_sample
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

RENAMED = {"thinkless": {"<|quad_start|>": "<short>"}, "qwen3": {}}
NAMES = {"R1": "R1"} | {format: name for name, (format, _, _) in TEMPLATES.items()}  # one model of each format
HARD = [
    "Start: two. Now: two plus three is five.", "4711 + x_1 = 42;\n\n\tthey're  ok", "a", "Hm. So",
    "数学 🙂👩‍👩‍👧 naïve e\u0301, then", "一二三四五六七八九十" * 3, " leading   and trailing \n\n",
    "{{ }} <b>&amp;</b> \\frac{1}{2}\n- a\n- b",
]  # fmt: skip


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def long_answers(folder: Path) -> Path:
    made = [(f"{p['problem']}", p["think"]) for p in demo.problems(12, 0)]
    made += [(f"{i} ?", f"<think>\n{text}\n</think>\n\nAnswer: {i}") for i, text in enumerate(HARD)]
    made += [(f"{i} close?", f"<think>{text}</think>{i}") for i, text in enumerate(HARD)]
    return write(folder / "long.jsonl", [{"prompt": q, "response": a} for q, a in made])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return demo.make_model(tmp_path_factory.mktemp("budgets") / "model", 0)


@pytest.fixture(scope="module")
def tokenizer_of(source, tmp_path_factory):
    """The patched tokenizer of the demo with the chat template, control tokens and EOS of a format."""

    def make(format: str, dialect: str) -> Path:
        folder = tmp_path_factory.mktemp(format)
        loaded = load_tokenizer(source)
        if format != "R1":
            _, loaded.chat_template, special = TEMPLATES[NAMES[format]]
            tags = {*re.findall(r"<\|\w+\|>|\[/?[A-Z_]+\]", loaded.chat_template), *special.values()}
            loaded.add_tokens([AddedToken(tag, normalized=False) for tag in sorted(tags)])
            loaded.add_special_tokens(special)
        loaded.save_pretrained(folder / "source")
        patch_tokenizer(folder / "source", folder / "patched", RENAMED[dialect], dialect=dialect)
        return folder / "patched"

    return make


def built(folder: Path, name: str, tokenizer: Path, dialect: str = "thinkless", **options) -> tuple[dict, list[dict]]:
    long = long_answers(folder) if not (folder / "long.jsonl").exists() else folder / "long.jsonl"
    options = {"held_out": 0, "seed": 0} | options
    facts = build_hybrid(long, "", folder / name, tokenizer=tokenizer, dialect=dialect, **options)
    return facts, [record for _, record in read_records(folder / name / "train.jsonl")]


def tokens(folder: Path, name: str, tokenizer: Path, dialect: str = "thinkless", workers: int = 0) -> TokenStore:
    out = folder / f"tokens-{name}-{workers}"
    tokenize(folder / name / "train.jsonl", tokenizer, out, 513, dialect=dialect, workers=workers)
    return TokenStore(out)


@pytest.mark.parametrize("dialect", RENAMED)
@pytest.mark.parametrize("format", NAMES)
def test_a_cut_trace_is_the_whole_one_without_the_end_of_its_thoughts_and_its_close_is_not_trained(
    format, dialect, tokenizer_of, tmp_path
):
    folder = tokenizer_of(format, dialect)
    tokenizer = load_tokenizer(folder)
    close, think = tokenizer.convert_tokens_to_ids(["</think>", "<think>"])
    (_, whole), (facts, cut) = (
        built(tmp_path, f"{share}", folder, dialect, budget_share=share) for share in (0.0, 1.0)
    )
    wholes, cuts = (tokens(tmp_path, f"{share}", folder, dialect) for share in (0.0, 1.0))
    control, samples = control_tokens(cuts), measure(cuts, tokenizer)
    assert [r["instruction"] for r in whole] == [r["instruction"] for r in cut]
    for i, (before, record) in enumerate(zip(whole, cut, strict=True)):
        (ids, mask), (cut_ids, cut_mask) = wholes[i], cuts[i]
        assert samples.cut[i] == record.get("thoughts_cut", False)
        if not samples.cut[i]:
            assert record == before and np.array_equal(ids, cut_ids) and np.array_equal(mask, cut_mask)
            continue
        opened, closed, at = ids.tolist().index(think), ids.tolist().index(close), cut_ids.tolist().index(close)
        assert opened + 1 < at < closed and mask[closed] == 1
        assert np.array_equal(cut_ids, [*ids[:at], close, *ids[closed + 1 :]])
        assert np.array_equal(cut_mask, [*mask[:at], 0, *mask[closed + 1 :]])
        assert cut_mask[at + 1 :].sum() >= 2, "answer and EOS"
        message = {"role": "assistant", "content": record["output"], "thoughts_cut": True}
        chat = [{"role": "user", "content": record["instruction"]}, message]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == cut_ids.tolist()
        assert encode(tokenizer, chat).loss_mask == cut_mask.tolist()
        names = [SPAN_NAMES[kind % len(SPAN_NAMES)] for kind in kinds(cut_ids, cut_mask > 0, control)]
        assert set(names[opened + 2 : at]) <= {"think"} and set(names[at + 1 : -1]) <= {"answer", "eos"}
        assert {MODE_NAMES[kind // len(SPAN_NAMES)] for kind in kinds(cut_ids, cut_mask > 0, control)} == {"think"}
        view = show_sample(cuts, i, tokenizer)
        assert view.remarks == show_sample(wholes, i, tokenizer).remarks
        assert [s.kind for s in view.segments][1:5] == ["think", "forced close", "answer", "EOS"]
    assert facts["thoughts_cut"]["cut"] == samples.cut.sum() > 15
    assert len(cuts) == 2 * facts["thoughts_cut"]["long"], "a short answer was cut from each long one before"


@pytest.mark.parametrize("name", ["demo", pytest.param("real", marks=needs_real)])
def test_a_cut_is_the_last_one_within_the_budget_that_survives_decoding_and_encoding(name, source, tmp_path):
    """Every budget of every text, against decoding the tokens; a cut may be within a character or a merge."""
    path = source if name == "demo" else Path(REAL) / "tokenizers" / "r1-distill-qwen"
    patch_tokenizer(path, tmp_path / "patched", RENAMED["thinkless"])
    tokenizer, moved = load_tokenizer(tmp_path / "patched"), 0
    close = tokenizer.convert_tokens_to_ids("</think>")
    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for thoughts in HARD:
        answer = f"<think>\n{thoughts}\n</think>\n\nAnswer: 4"
        ids = ids_of(answer)
        end = ids.index(close)

        def survives(n, ids=ids, end=end):
            text = tokenizer.decode(ids[: 1 + n])
            same = ids_of(f"{text}</think>\n\nAnswer: 4") == ids[: 1 + n] + ids[end:]
            return same and text.removeprefix("<think>").strip()

        for budget in range(1, end + 2):
            ((found),) = cut_answers(tokenizer.backend_tokenizer, [answer], Budgets(1, budget, budget), [0.5])
            expected = next((n for n in range(budget, 0, -1) if survives(n)), 0) if budget < end - 1 else 0
            assert (found[2] if found else 0) == expected
            if found:
                assert ids_of(found[0]) == ids[: 1 + expected] + ids[end:] and found[1] == len(ids_of(found[0]))
            moved += budget < end - 1 and expected < budget
    assert moved > 5


def test_the_share_is_exact_budgets_are_within_their_range_and_a_seed_repeats_them(tokenizer_of, tmp_path):
    folder = tokenizer_of("R1", "thinkless")
    sources = demo.make_sources(tmp_path / "sources", 300, seed=0, short_up_to=1)
    options = {"long": sources / "long.jsonl", "short": sources / "short.jsonl", "tokenizer": folder, "held_out": 0.1}
    options |= {"modes": "by_need"}
    budgets = {"budget_share": 0.4, "budget_min": 4, "budget_max": 20}
    made = build_hybrid(folder=tmp_path / "a", seed=1, **options, **budgets)
    build_hybrid(folder=tmp_path / "again", seed=1, **options, **budgets)
    build_hybrid(folder=tmp_path / "other", seed=2, **options, **budgets)
    plain = build_hybrid(folder=tmp_path / "plain", seed=1, **options)
    first, again, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in ("a", "again", "other"))
    assert first == again != other
    assert (tmp_path / "a/heldout.jsonl").read_bytes() == (tmp_path / "plain/heldout.jsonl").read_bytes()
    found = made["thoughts_cut"]
    assert found["cut"] + found["whole"] == round(0.4 * found["long"]) and found["whole"] > 0
    assert 4 <= found["tokens"][0] <= found["tokens"][1] <= found["tokens"][2] <= 20
    rows, wholes = ([r for _, r in read_records(tmp_path / name / "train.jsonl")] for name in ("a", "plain"))
    changed = [(a, b) for a, b in zip(rows, wholes, strict=True) if a != b]
    assert len(changed) == found["cut"] and {a["mode"] for a, _ in changed} == {"think"}
    assert {a.get("mode_given") for a, _ in changed} == {None, True}, "cut in either role"
    assert all(a.keys() - b.keys() == {"thoughts_cut"} and a["answer"] == b["answer"] for a, b in changed)
    tokenize(tmp_path / "a/train.jsonl", folder, tmp_path / "tokens", 513, workers=0)
    store, think = TokenStore(tmp_path / "tokens"), made["balance"]["train"]["think"]["answer"]
    lengths = sum(len(load_tokenizer(folder)(r["output"])["input_ids"]) for r in rows if r["mode"] == "think")
    assert think == lengths and made["balance"] != plain["balance"] and len(store) == len(rows)
    shown = dict(budgets_table(made).rows)
    assert shown["thoughts cut"] == found["cut"] and shown["tokens of thoughts left: median"] == found["tokens"][1]
    assert not budgets_table(plain).rows


def test_any_number_of_processes_writes_the_same_bytes(tokenizer_of, tmp_path):
    folder = tokenizer_of("R1", "thinkless")
    demo.make_sources(tmp_path / "sources", 400, seed=0)
    build_hybrid(tmp_path / "sources/long.jsonl", "", tmp_path / "cut", 0, 0, tokenizer=folder, budget_share=0.5)
    alone, several = (tokens(tmp_path, "cut", folder, workers=count).folder for count in (0, 2))
    for name in ("text_document.bin", "loss_mask.bin"):
        assert (alone / name).read_bytes() == (several / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_share": 0.1, "tokenizer": ""}, "budgets are in tokens: give `tokenizer`"),
        ({"budget_share": 1.1}, "must be from 0 to 1"),
        ({"budget_share": 0.1, "budget_min": 0}, "budget_min=0 at least 1"),
        ({"budget_share": 0.1, "budget_min": 9, "budget_max": 8}, "budget_max=8 at least budget_min"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_hybrid(long_answers(tmp_path), "", tmp_path / "out", 0, 0, **{"tokenizer": "x"} | options)
    assert not (tmp_path / "out").exists()


def test_a_row_that_says_it_is_cut_and_has_no_close_is_rejected(tokenizer_of, tmp_path):
    rows = [
        {"prompt": "a", "response": "<think>x</think>4", "thoughts_cut": True},
        {"prompt": "b", "response": "<short>4", "thoughts_cut": True},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "4", "thoughts_cut": 1}]},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    made = tokenize(data, tokenizer_of("R1", "thinkless"), tmp_path / "out", workers=0, reject_limit=1)
    assert made["counts"]["written"] == 1 and made["counts"]["rejected"] == 2
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out.rejected.jsonl").read_text().splitlines()]
    assert "thoughts_cut is true, but the answer contains no </think>" in reasons[0]
    assert "thoughts_cut is 1, expected true or false" in reasons[1]


def test_a_trace_that_is_cut_already_is_not_built_into_a_dataset_as_a_whole_one(tmp_path):
    rows = [{"prompt": "a", "response": "<think>x</think>4", "thoughts_cut": True}]
    data = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "b", "response": "<short>4"}])
    build_hybrid("", "", tmp_path / "out", 0, 0, hybrid=data, reject_limit=1)
    assert "a budget has cut this answer already" in (tmp_path / "out.rejected.jsonl").read_text()
