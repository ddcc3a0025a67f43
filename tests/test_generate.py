"""Answers in either mode, and their marks: pytest tests/test_generate.py"""

import pytest
from transformers import Qwen2ForCausalLM

from rsft_lib import demo
from rsft_lib.generate import Answer, final_answer, generate, score, well_formed
from rsft_lib.tokenizer import load_tokenizer, patch_tokenizer

THOUGHT = "<think>\nStart: two.\n</think>\n\nAnswer: two"
QUESTIONS = ["two", "two plus three", "Anna has five books. How many books now?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model with random weights and a patched tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    source = demo.make_model(folder / "source", seed=0)
    patch_tokenizer(source, folder / "model", {"<|quad_start|>": "<short>"})
    Qwen2ForCausalLM.from_pretrained(source).save_pretrained(folder / "model")
    return folder / "model"


def speaking(model, folder, *texts):
    """A copy of `model` in `folder` that continues every token with the one after it in `texts`."""
    tokenizer = load_tokenizer(model)
    chains = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    seen = sorted({token for chain in chains for token in chain})
    mute = Qwen2ForCausalLM.from_pretrained(model)
    for name, weight in mute.named_parameters():
        if not name.endswith("norm.weight"):
            weight.data.zero_()
    for direction, token in enumerate(seen):
        mute.model.embed_tokens.weight.data[token, direction] = 1
    for now, then in (pair for chain in chains for pair in zip(chain, chain[1:], strict=False)):
        mute.lm_head.weight.data[then, seen.index(now)] = 1
    mute.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_begins_with_the_control_token_that_was_asked_for_and_stops_at_the_end_token(model, tmp_path):
    end = demo.EOS
    speaker = speaking(model, tmp_path, f"<think> two</think> three{end}", f"<short> three{end}")
    assert generate(speaker, QUESTIONS, "think") == [Answer("<think> two</think> three", 4, True)] * 3
    assert generate(speaker, QUESTIONS, "short") == [Answer("<short> three", 2, True)] * 3


def test_with_no_mode_the_model_writes_the_control_token_itself(model, tmp_path):
    speaker = speaking(model, tmp_path, f"<｜Assistant｜><short> three{demo.EOS}")
    assert generate(speaker, QUESTIONS[:1], None) == [Answer("<short> three", 2, True)]


def test_an_answer_that_was_cut_off_did_not_end(model, tmp_path):
    speaker = speaking(model, tmp_path, "<think> two two")
    assert generate(speaker, QUESTIONS[:1], "think", max_new_tokens=3) == [Answer("<think> two two two", 4, False)]


def test_a_question_is_answered_alike_alone_and_in_a_batch_with_longer_ones(model):
    together = generate(model, QUESTIONS, "think", max_new_tokens=12)
    alone = [generate(model, [question], "think", max_new_tokens=12)[0] for question in QUESTIONS]
    in_pairs = generate(model, QUESTIONS, "think", max_new_tokens=12, batch_size=2)
    assert together == alone == in_pairs
    assert len({answer.text for answer in alone}) > 1, "the model must not say the same to all"


@pytest.mark.parametrize(
    ("text", "mode", "good"),
    [
        (THOUGHT, "think", True),
        (THOUGHT, "short", False),
        ("<short>Answer: two", "short", True),
        ("<short>Answer: two", "think", False),
        ("Answer: two", "short", False),
        ("Start: two.</think>\n\nAnswer: two", "think", False),
        ("<short>\n", "short", False),
        ("<short>Answer: two</think>", "short", False),
        ("<short>Answer: <short>two", "short", False),
        ("<think>\nStart: two.", "think", False),
        ("<think>\nStart: two.\n</think>\n\n", "think", False),
        (THOUGHT + "</think> two", "think", False),
        (THOUGHT + "<short>", "think", False),
        ("Well, " + THOUGHT, "think", False),
    ],
)
def test_an_answer_is_well_formed_only_in_its_own_mode_with_its_tokens_once_and_something_after_them(text, mode, good):
    assert well_formed(Answer(text, tokens=9, ended=True), mode) == good
    assert not well_formed(Answer(text, tokens=9, ended=False), mode)


def test_the_final_answer_is_what_stands_after_the_last_mark():
    assert final_answer(THOUGHT) == "two"
    assert final_answer("<think>Answer: three</think>\n\nAnswer: two\n") == "two"
    assert final_answer("<short>two") is None


def test_a_score_is_the_share_of_right_and_of_well_formed_answers_and_their_mean_length():
    right, wrong = Answer("<short>Answer: two", 3, True), Answer("<short>Answer: three", 3, True)
    endless, silent = Answer("<short>Answer: two two", 8, False), Answer("<short>two", 2, True)
    marks = score([right, wrong, endless, silent], ["two"] * 4, "short")
    assert marks == {"accuracy": 0.25, "well_formed": 0.75, "tokens": 4.0}


def test_as_many_answers_as_references_are_expected():
    with pytest.raises(ValueError):
        score([Answer("<short>Answer: two", 3, True)], ["two", "three"], "short")
