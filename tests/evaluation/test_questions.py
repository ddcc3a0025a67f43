"""What a model is asked of held-out records."""

import json

import pytest

from rsft_lib.evaluation.questions import held_out_questions, modes_asked

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


def test_each_question_is_asked_once_with_all_that_comes_before_the_answer(tmp_path):
    path = write(tmp_path, ROWS)
    one, two, three = held_out_questions(path, 9)
    assert one.messages == [{"role": "user", "content": "1 + 1 ?"}] and one.expected == "2" and one.text == "1 + 1 ?"
    assert [m["content"] for m in two.messages] == ["Be strict.", "a", "b", "And now?"] and two.expected is None
    assert two.text == "And now?" and three.tools == [{"name": "f"}]
    assert held_out_questions(path, 2) == [one, two] and held_out_questions(path, 1) == [one]


@pytest.mark.parametrize("count", [0, -1])
def test_no_questions_are_not_all_questions(tmp_path, count):
    with pytest.raises(ValueError, match=f"^questions is {count}; ask at least 1$"):
        held_out_questions(write(tmp_path, ROWS), count)


def test_a_model_is_asked_in_the_modes_that_it_learned(tmp_path):
    other = {**ROWS[3], "mode": "other"}
    assert modes_asked(write(tmp_path, ROWS)) == ["think", "short", None]
    assert modes_asked(write(tmp_path, [other, other])) == ["other"]
    for beside in (ROWS[0], ROWS[3], {**other, "mode": ["other"]}, {**other, "mode": {"other": 1}}):
        assert modes_asked(write(tmp_path, [other, beside, other])) == ["think", "short", None], beside


def test_a_file_without_questions_or_with_a_bad_record_is_named(tmp_path):
    with pytest.raises(ValueError, match="heldout.jsonl holds no question"):
        held_out_questions(write(tmp_path, []), 5)
    with pytest.raises(ValueError, match="heldout.jsonl:2: found the fields"):
        held_out_questions(write(tmp_path, [ROWS[0], {"x": 1}]), 5)
