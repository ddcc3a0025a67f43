"""Evaluation questions from held-out records."""

import json
import math

import pytest

from rsft_lib import demo
from rsft_lib.generation.questions import held_out_questions, modes_asked, room_for_answers
from rsft_lib.tokenizer.dialect import QWEN3
from rsft_lib.tokenizer.patch import load_tokenizer

ROWS = [
    {"instruction": "1 + 1 ?", "output": "<think>\nhm\n</think>\n\n2", "mode": "think", "answer": 2},
    {"instruction": "1 + 1 ?", "output": "<short>2", "mode": "short", "answer": 3},
    {"instruction": "And now?", "output": "<short>C", "mode": "short", "system": "Be strict.", "history": [["a", "b"]]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "tools": [{"name": "f"}]},
]


def write(folder, rows):
    path = folder / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_are_distinct_and_have_the_conversation_before_the_answer(tmp_path):
    path = write(tmp_path, ROWS)
    one, two, three = held_out_questions(path, 9)
    assert one.messages == [{"role": "user", "content": "1 + 1 ?"}] and one.expected == "2" and one.text == "1 + 1 ?"
    assert [m["content"] for m in two.messages] == ["Be strict.", "a", "b", "And now?"] and two.expected is None
    assert two.text == "And now?" and three.tools == [{"name": "f"}]
    assert held_out_questions(path, 2) == [one, two] and held_out_questions(path, 1) == [one]


def test_a_question_that_is_asked_by_two_switches_is_one_question(tmp_path):
    rows = [{"instruction": f"1 + 1 ?{switch}", "output": "2"} for switch in (" /think", " /no_think", "")]
    (question,) = held_out_questions(write(tmp_path, rows), 9, QWEN3)
    assert question.text == "1 + 1 ?" and len(held_out_questions(write(tmp_path, rows), 9)) == 3


def test_answers_may_be_a_quarter_longer_than_the_longest_of_the_records(tmp_path):
    tokenizer = load_tokenizer(demo.make_model(tmp_path / "model", seed=1))
    longest = 1 + max(len(tokenizer(row["output"])["input_ids"]) for row in ROWS[:2])
    assert room_for_answers(write(tmp_path, ROWS), tokenizer) == math.ceil(1.25 * longest)
    with pytest.raises(ValueError, match="no answers .* set max_new_tokens"):
        room_for_answers(write(tmp_path, [{"messages": [{"role": "user", "content": "x"}]}]), tokenizer)


def test_a_difficulty_is_a_number(tmp_path):
    rows = [{"instruction": f"{level}?", "output": "x", "difficulty": level} for level in (2, 0.5, "hard", None)]
    assert [question.difficulty for question in held_out_questions(write(tmp_path, rows), 9)] == [2, 0.5, None, None]


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_rejected(tmp_path, count):
    with pytest.raises(ValueError, match=f"^questions is {count}; expected at least 1$"):
        held_out_questions(write(tmp_path, ROWS), count)


def test_a_model_is_evaluated_in_the_modes_of_its_data(tmp_path):
    other = {**ROWS[3], "mode": "other"}
    assert modes_asked(write(tmp_path, ROWS)) == ["think", "short", None]
    assert modes_asked(write(tmp_path, [other, other])) == ["other"]
    for added in (ROWS[0], ROWS[3], {**other, "mode": ["other"]}, {**other, "mode": {"other": 1}}):
        assert modes_asked(write(tmp_path, [other, added, other])) == ["think", "short", None], added


def test_errors_name_a_file_without_questions_or_a_bad_record(tmp_path):
    with pytest.raises(ValueError, match="heldout.jsonl contains no questions"):
        held_out_questions(write(tmp_path, []), 5)
    with pytest.raises(ValueError, match="heldout.jsonl:2: found the fields"):
        held_out_questions(write(tmp_path, [ROWS[0], {"x": 1}]), 5)
