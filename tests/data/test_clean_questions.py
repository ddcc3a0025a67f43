"""Questions: repeated ones, those of evaluation sets, unusable ones."""

import json
import random
import re
import unicodedata

import pytest

from rsft_lib.data.clean_questions import clean_questions
from rsft_lib.data.overlap import COMMON, EvaluationQuestions, normalized_words


def write(file, rows):
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def lines(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def words(rng, count):
    return [f"w{rng.randrange(40)}" for _ in range(count)]


def shares_13_words(text, other):
    """By brute force, without the code under test: `text` and `other` are lower-case words between single spaces."""
    if text == other:
        return True
    own, others = text.split(), f" {other} "
    return any(f" {' '.join(own[at : at + 13])} " in others for at in range(len(own) - 12))


def test_a_shared_run_of_13_words_is_found_exactly_where_brute_force_finds_one():
    rng, found = random.Random(1), 0
    for _ in range(300):
        others = [" ".join(words(rng, rng.randrange(1, 40))) for _ in range(3)]
        start, length = rng.randrange(20), rng.randrange(10, 16)  # both sides of the limit
        part = " ".join(others[0].split()[start : start + length])
        text = rng.choice(others) if rng.random() < 0.1 else " ".join([*words(rng, 5), part, *words(rng, 5)])
        known = EvaluationQuestions()
        for number, other in enumerate(others):
            known.add(str(number), other)
        for number in range(6):  # of three questions, what two have would be a form
            known.add("", f"another question {number}")
        match, expected = known.find(text), [i for i, other in enumerate(others) if shares_13_words(text, other)]
        assert (match is not None) == bool(expected)
        if match:
            found += 1
            assert int(match.place) in expected and match.text in text and match.words == len(match.text.split())
            assert match.text in others[int(match.place)]
    assert 50 < found < 250


SENTENCE = "A train leaves the old station at 9:30 and drives 120 km to the sea; how long does it take?"


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (SENTENCE.upper().replace(" ", "\n  "), 21),  # case and white space
        (f"**Problem.** {SENTENCE.replace(';', ' —').replace('?', '')} Think!", 21),  # punctuation and markup
        (unicodedata.normalize("NFKD", f"Éva asks: {SENTENCE}").replace("9", "\uff19"), 21),  # forms of characters
        (SENTENCE.replace("120", "150"), 0),  # 11 words before the number, 9 after it
        (SENTENCE.replace("take", "last"), 20),
        ("How long does it take?", 0),  # shorter, and only a part
    ],
)
def test_case_space_punctuation_and_forms_of_characters_do_not_count_but_numbers_do(text, shared):
    known = EvaluationQuestions()
    known.add("evaluation:1", SENTENCE)
    match = known.find(text)
    assert (match.words if match else 0) == shared
    if match:
        assert match.place == "evaluation:1" and re.match(r"a\s+train", match.text, re.I)


def test_signs_are_words_and_hyphens_between_letters_are_not():
    asked = ["3 + 4", "3 - 4", "3 * 4", "3 / 4", "3 ^ 4", "3 = 4", "34", "3 4", "x y", "x + y"]
    assert len({" ".join(normalized_words(text)) for text in asked}) == len(asked)
    assert normalized_words("A two-digit *number*") != normalized_words("A two digit number"), "a single * is a sign"
    assert normalized_words("**A** two-digit number") == normalized_words("a TWO digit number!")
    assert normalized_words("3 − 4") == normalized_words("3 - 4")
    assert normalized_words("三加四") == ["三", "加", "四"]


FORM = "Please think step by step and give the final answer to this question in a box:"


def known_with(count: int, others: int) -> EvaluationQuestions:
    known = EvaluationQuestions()
    for number in range(count):
        known.add(f"e:{number}", f"{FORM} what is {number}?")
        known.add(f"f:{number}", f"{FORM} what is {number}?")  # the same questions in a second file
    for number in range(others):
        known.add(f"g:{number}", f"another question {number}")
    return known


@pytest.mark.parametrize(
    ("count", "others", "asked", "form"),
    [
        (COMMON, 30, 1, False), (COMMON + 1, 30, 1, True),  # of the evaluation questions
        (3, 3, 1, False), (4, 3, 1, True), (1, 0, 1, False),  # half of them
        (1, 30, COMMON, False), (1, 30, COMMON + 1, True),  # of the questions
    ],
)  # fmt: skip
def test_a_run_that_many_have_is_a_form_but_the_whole_of_an_evaluation_question_is_a_leak(count, others, asked, form):
    known = known_with(count, others)
    for number in range(asked):
        known.count(f"{FORM} name prime {number}.")
    match = known.find(f"{FORM} name a prime.")
    assert match.form == form and match.words == 16 and len(known.places) == count + others
    for text in (f"{FORM} WHAT is 0", f"A form. {FORM} what is 0? Explain."):
        found = known.find(text)
        assert (found.place, found.form, found.words) == ("e:0", False, 19)
    assert known.find("A form. Another question 1? Explain.") is None, "fewer than 13 words are compared whole"


def test_questions_are_kept_in_order_and_all_others_are_listed_with_the_reason(tmp_path):
    leaked = f"Hello. {SENTENCE}"
    rows = [
        {"question": "What is 1 + 1?", "answer": 2, "id": "a", "difficulty": 1},
        {"problem": "What is 2 + 2?", "solution": "It is \\boxed{4}."},
        "not JSON\n",
        {"instruction": "what is 1+1", "output": "", "answer": "3"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": leaked}], "answer": "x"},
        {"prompt": "Unanswered?"},
        {"conversations": [{"from": "human", "value": "Six?"}, {"from": "gpt", "value": "Well.\n#### 6"}]},
        {"question": "Last?", "answer": "7"},
        {"question": {"text": "broken"}, "answer": "7"},
        '{"question": "Half a character?", "answer": "7", "id": "\\ud800"}\n',
    ]
    source = write(tmp_path / "questions.jsonl", rows)
    tests = [
        write(tmp_path / "one.jsonl", [{"question": SENTENCE, "answer": ["any"]}, {"nothing": 1}]),
        write(tmp_path / "two.jsonl", [{"prompt": "other", "response": "x"}]),
    ]
    folder = tmp_path / "cleaned"
    made = clean_questions(source, folder, tests, count=3, reject_limit=0.5)
    assert made["counts"] == {
        "read": 10, "rejected": 4, "duplicates": 1, "leaked": 1, "beyond": 1, "kept": 3, "with_forms": 0,
        "evaluation": 2, "evaluation_rejected": 1,
    }  # fmt: skip
    kept = lines(folder, "questions")
    assert [one["messages"][-1]["content"] for one in kept] == ["What is 1 + 1?", "What is 2 + 2?", "Six?"]
    assert [one["answer"] for one in kept] == ["2", "4", "6"] and (kept[0]["id"], kept[0]["difficulty"]) == ("a", 1)
    assert lines(folder, "duplicates") == [
        {"place": f"{source}:4", "question": "what is 1+1", "same_as": f"{source}:1"}
    ]
    (leak,) = lines(folder, "leaks")
    assert leak == {
        "place": f"{source}:5", "question": leaked, "evaluation": f"{tests[0]}:1", "words": 21,
        "text": SENTENCE.removesuffix("?"),
    }  # fmt: skip
    rejected = lines(tmp_path, "cleaned.rejected")
    assert [(one["file"], one["line"]) for one in rejected] == [
        (str(tests[0]), 2), (str(source), 3), (str(source), 6), (str(source), 9), (str(source), 10),
    ]  # fmt: skip
    assert "the known answer is None" in rejected[2]["reason"]


def test_brackets_and_signs_make_another_question(tmp_path):
    texts = ["(3+4)*2 ?", "3+(4*2) ?", "Last digit of 7!", "Last digit of 7", "Count A \u222a B.", "Count A \u2229 B."]
    source = write(tmp_path / "questions.jsonl", [{"question": text, "answer": "1"} for text in texts])
    assert clean_questions(source, tmp_path / "cleaned")["counts"]["kept"] == len(texts)


def test_the_known_answer_may_be_in_the_response_that_a_column_names(tmp_path):
    source = write(tmp_path / "questions.jsonl", [{"problem": "Four?", "solution": "It is \\boxed{4}."}])
    clean_questions(source, tmp_path / "cleaned", columns={"answer": "solution"})
    assert [one["answer"] for one in lines(tmp_path / "cleaned", "questions")] == ["4"]


def test_questions_that_share_a_form_only_are_kept_and_listed(tmp_path):
    texts = [f"{FORM} name prime {number}." for number in range(COMMON + 1)]
    source = write(tmp_path / "q.jsonl", [{"question": text, "answer": "x"} for text in [*texts, texts[0]]])
    evaluation = write(tmp_path / "e.jsonl", [{"question": f"{FORM} what is 2?"}])
    counts = clean_questions(source, tmp_path / "cleaned", [evaluation])["counts"]
    assert (counts["kept"], counts["with_forms"], counts["leaked"], counts["duplicates"]) == (11, 11, 0, 1)
    assert {one["text"] for one in lines(tmp_path / "cleaned", "forms")} == {FORM.removesuffix(":")}
    assert sorted(path.name for path in (tmp_path / "cleaned").iterdir()) == [
        "duplicates.jsonl", "forms.jsonl", "leaks.jsonl", "manifest.json", "questions.jsonl",
    ]  # fmt: skip


def test_names_of_fields_are_given_and_too_many_bad_rows_leave_no_folder(tmp_path):
    rows = [{"q": f"How many are {n} + 1?", "gold": n + 1} for n in range(3)]
    source = write(tmp_path / "q.jsonl", rows)
    names = {"prompt": "q", "answer": "gold"}
    assert clean_questions(source, tmp_path / "cleaned", columns=names)["counts"]["kept"] == 3
    with pytest.raises(ValueError, match="(?s)q.jsonl:1: found the fields .*3 of 3 records are rejected"):
        clean_questions(source, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for content, message in (
        ([{"q": "x"}, *rows], "no question is left"),
        ([{"other": 1}], "evaluation set .* has no"),
    ):
        evaluation = write(tmp_path / "evaluation.jsonl", content)
        with pytest.raises(ValueError, match=message):
            clean_questions(source, tmp_path / "none", [evaluation], columns=names, reject_limit=1)
        assert not (tmp_path / "none").exists()
