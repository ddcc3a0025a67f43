"""Sampled answers: the same bytes however they are computed, and the right ones among them as pairs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real import REAL, needs_real
from support import tiny_tokenizer
from transformers import Qwen2ForCausalLM

from rsft_lib import demo
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.answers import equal_by_math_verify, has_math_verify
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.generation import make_pairs as making
from rsft_lib.generation import sampled_answers
from rsft_lib.generation.generate import dialect_of_any
from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.make_pairs import make_pairs
from rsft_lib.generation.sampled_answers import asked_of, chunks_of, read_answers, read_questions, write_missing
from rsft_lib.tokenizer.chat import prompt_text
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

QUESTIONS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model, patched; its chat template refuses one word."""
    folder = tmp_path_factory.mktemp("pairs")
    source = demo.make_model(folder / "source", seed=0)
    patch_tokenizer(source, folder / "model", {"<|quad_start|>": "<short>"})
    Qwen2ForCausalLM.from_pretrained(source).save_pretrained(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    refusal = "{% if 'forbidden' in messages[-1].content %}{{ raise_exception('not this') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "manifest.json").unlink()
    return folder / "model"


def questions_in(file: Path, texts, answers=None) -> Path:
    rows = [{"messages": [{"role": "user", "content": text}], "answer": "4"} for text in texts]
    for row, answer in zip(rows, answers or [], strict=False):
        row["answer"] = answer
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    """The files of answers; a lock may be left beside one whose writer was killed right after it was renamed."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[a-z]*.jsonl"))}


def test_any_number_of_ranks_any_batch_and_any_resumption_write_the_same_bytes(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled_answers, "CHUNK", 3)
    texts = [one["problem"] for one in demo.problems(QUESTIONS, seed=1)]
    questions = read_questions(questions_in(tmp_path / "questions.jsonl", texts))
    asked = asked_of(model, model, 2, Sampling(8, 1.0, seed=1))
    for name, ranks, batch_size in (("whole", 1, 64), ("shared", 3, 64), ("small", 1, 1)):
        for rank in range(ranks):
            write_missing(asked, questions, tmp_path / name, batch_size=batch_size, rank=rank, ranks=ranks)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 2 * 4 and contents(tmp_path / "shared") == whole == contents(tmp_path / "small")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()}
    for path in [*kept][::2]:
        path.unlink()
        del kept[path]
    write_missing(asked, questions, tmp_path / "shared")
    assert contents(tmp_path / "shared") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a complete file was written again"
    for one in asked:
        answers = [*read_answers(one, questions, tmp_path / "whole")]
        assert [len(own) for own in answers] == [2] * QUESTIONS and any(a.text != b.text for a, b in answers)
    other = asked_of(model, model, 2, Sampling(8, 1.0, seed=2))
    assert {chunk.file for chunk in chunks_of(other[0], questions, tmp_path / "whole")}.isdisjoint(
        (tmp_path / "whole").iterdir()
    )


def test_sampling_that_is_killed_goes_on_with_other_ranks_to_the_same_bytes(model, tmp_path):
    """One of two ranks is killed after its first file; the rest is written by one."""
    texts = [one["problem"] for one in demo.problems(3 * sampled_answers.CHUNK, seed=1)]
    file, folder = questions_in(tmp_path / "questions.jsonl", texts), tmp_path / "killed"
    asked = asked_of(model, model, 1, Sampling(8, 1.0, seed=1))
    command = [sys.executable, "-m", "rsft_lib.generation.sampled_answers", file, folder, json.dumps(asked)]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    process = subprocess.Popen(command, env=os.environ | ranks, stdout=subprocess.DEVNULL)
    while process.poll() is None and not contents(folder):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(contents(folder)) < 6
    for name in ("killed", "whole"):
        write_missing(asked, read_questions(file), tmp_path / name)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_file_of_answers_is_complete_or_absent(model, tmp_path, monkeypatch):
    questions = read_questions(questions_in(tmp_path / "questions.jsonl", ["one", "two"]))
    lines = iter(["{}\n"])
    monkeypatch.setattr(sampled_answers, "_line", lambda answers: next(lines))  # the second one raises
    with pytest.raises(RuntimeError):
        write_missing(asked_of(model, model, 1, Sampling(2)), questions, tmp_path / "answers")
    assert [*(tmp_path / "answers").iterdir()] == []


def test_a_question_that_the_model_cannot_be_asked_has_no_answers_and_the_others_have(model, tmp_path, capsys):
    texts = ["one", "a forbidden word", "word " * 2000, "two"]
    file = questions_in(tmp_path / "questions.jsonl", texts)
    asked = asked_of(model, model, 2, Sampling(4, 1.0))
    write_missing(asked, read_questions(file), tmp_path / "answers")
    assert [len(own) for own in read_answers(asked[1], read_questions(file), tmp_path / "answers")] == [2, 0, 0, 2]
    assert "'a forbidden word': " in (shown := capsys.readouterr().out) and "1,024 positions" in shown
    assert make_pairs(file, asked, tmp_path / "answers", tmp_path / "pairs")["modes"]["short"]["answers"] == 4


@needs_real
def test_r1_is_asked_by_its_own_think_and_by_an_empty_block_and_an_instruct_model_as_it_is(real_tokenizer, tmp_path):
    question = [{"role": "user", "content": "2 + 2 ?"}]
    tokenizer, dialect = load_tokenizer(real_tokenizer), dialect_of_any(real_tokenizer)
    own = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt_text(tokenizer, question, "think", None, dialect) == own  # its template writes <think> already
    assert prompt_text(tokenizer, question, "short", None, dialect) == f"{own}\n</think>\n\n"
    instruct = tiny_tokenizer(tmp_path / "instruct")
    assert dialect_of_any(instruct).forms == {}
    with pytest.raises(ValueError, match="instruct has no <think> .*give this one as `short_model`"):
        asked_of(instruct, instruct, 1, Sampling(1))
    think, short = asked_of(real_tokenizer, instruct, 1, Sampling(1))
    assert (think.model, short.model) == (str(real_tokenizer), str(instruct)) and think.identity != short.identity


@pytest.fixture
def real_tokenizer() -> Path:
    return Path(REAL) / "tokenizers" / "r1-distill-qwen"


def answered(folder: Path, written: dict[str, list[list]]) -> tuple[Path, list]:
    """Questions with the answer 4, and what a model wrote: mode -> question -> texts, or (text, False) if cut off."""
    with new_folder(folder / "model", {"made_by": "export", "dialect": "thinkless"}):
        pass
    file = questions_in(folder / "questions.jsonl", [f"q{n}" for n in range(len(written["think"]))])
    asked = asked_of(folder / "model", folder / "model", len(written["think"][0]), Sampling(9))
    (folder / "answers").mkdir()
    for one in asked:
        (chunk,) = chunks_of(one, read_questions(file), folder / "answers")
        rows = [[text if isinstance(text, tuple) else (text, True) for text in own] for own in written[one.mode]]
        answers = [[{"text": t, "tokens": len(t), "ended": e} for t, e in own] for own in rows]
        chunk.file.write_text("".join(json.dumps({"answers": own}) + "\n" for own in answers))
    return file, asked


GOOD, LONGER = "<think>\nhm\n</think>\n\nAnswer: 4", "<think>\nhm, hm\n</think>\n\nAnswer: 4"
WRONG, EMPTY = "<think>\nhm\n</think>\n\nAnswer: 5", "<think></think>Answer: 4"
CUT = ("<think>\nhm", False)


def test_the_shortest_right_and_well_formed_answer_of_each_mode_is_kept_with_the_shares(tmp_path):
    file, asked = answered(tmp_path, {
        "think": [[LONGER, GOOD, WRONG, CUT], [WRONG] * 4, [WRONG, CUT, EMPTY, "Answer: 4"], [GOOD] * 4],
        "short": [["<short>Answer: 4.0", "<short>4", "<short>Answer: 5", "<short>#### 4"], ["<short>Answer: 4"] * 4,
                  ["<short>Answer: 4</think>Answer: 4", "<short>Answer: 5", "<short>", ("<short>Answer: 4", False)],
                  ["<short>Answer: 5"] * 4],
    })  # fmt: skip
    made = make_pairs(file, asked, tmp_path / "answers", tmp_path / "pairs")
    assert made["problems"] == {"both": 1, "think_only": 1, "short_only": 1, "neither": 1}
    assert made["shares"] == [[0, 0, 1], [0, 4, 1], [2, 2, 1], [4, 0, 1]]
    think = {"answers": 16, "well_formed": 12, "right": 6, "cut_off": 2, "tokens": made["modes"]["think"]["tokens"]}
    assert made["modes"]["think"] == think and made["modes"]["short"]["right"] == 6
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    found = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]
    assert found == [("q0", GOOD), ("q0", "<short>#### 4"), ("q1", "<short>Answer: 4"), ("q3", GOOD)]
    shares = [(row["long_right"], row["short_right"]) for row in rows]
    assert shares == [(0.5, 0.5), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)]
    (left,) = (tmp_path / "pairs" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(left)["question"] == "q2" and json.loads(left)["said"]["think"][0] == "5"


def test_notebook_03_takes_the_pairs_and_learns_by_need_from_their_shares(tmp_path):
    right, wrong = "<short>Answer: 4", "<short>Answer: 5"
    file, asked = answered(tmp_path, {
        "think": [[GOOD, GOOD], [GOOD, GOOD]], "short": [[right, right], [right, wrong]],
    })  # fmt: skip
    make_pairs(file, asked, tmp_path / "answers", tmp_path / "pairs")
    for limit, chosen in ((0, {"q0": "short", "q1": "short"}), (0.4, {"q0": "short", "q1": "think"})):
        folder = tmp_path / f"built-{limit}"
        built = build_hybrid("", "", folder, 0, 1, hybrid=tmp_path / "pairs" / "pairs.jsonl", modes="by_need",
                             short_up_to=limit)  # fmt: skip
        assert built["records"]["rejected"] == 0 and built["unused_fields"] == {}
        rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        assert {row["instruction"]: row["mode"] for row in rows if not row.get("mode_given")} == chosen
        assert {row["short_right"] for row in rows} == {1.0, 0.5}


def test_an_answer_in_a_notation_that_only_math_verify_knows_is_right_and_notebook_03_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "has_math_verify", lambda: True)
    monkeypatch.setattr(making, "version", lambda name: "0")
    monkeypatch.setattr(making, "equal_by_math_verify", lambda answer, expected: answer == "2 + 2")
    file, asked = answered(tmp_path, {"think": [[GOOD.replace("4", "2 + 2")]], "short": [["<short>Answer: 4"]]})
    made = make_pairs(file, asked, tmp_path / "answers", tmp_path / "pairs")
    assert made["judges"] == ["kit", "math-verify 0"] and made["by_math_verify"] == 1
    built = build_hybrid("", "", tmp_path / "built", 0, 1, hybrid=tmp_path / "pairs" / "pairs.jsonl")
    assert built["records"] == {"read": 2, "rejected": 0, "disagreeing": 0, "cut": 0}


@pytest.mark.skipif(not has_math_verify(), reason="math-verify is not installed (pip install -e '.[math]')")
def test_math_verify_knows_equal_formulas_and_is_not_asked_about_words():
    equal = [("2(x + 1)", "2x + 2"), ("\\frac{2}{4}", "0.5"), ("x^2-1", "(x-1)(x+1)"), ("y+1", "$1+y$")]
    assert all(equal_by_math_verify(*pair) for pair in equal)
    other = [("2(x + 1)", "2x + 1"), ("silent", "listen"), ("\\frac{", "\\frac{1}{2}"), ("", "3")]
    assert not any(equal_by_math_verify(*pair) for pair in other)
