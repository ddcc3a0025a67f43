"""Answers by mode, and their scores."""

import importlib.util
import json
import re
import shutil
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2ForCausalLM

from rsft_lib import demo
from rsft_lib.common.artifact import write_manifest
from rsft_lib.display.model.answers import (
    budgets_table,
    choices_table,
    obedience_table,
    plot_answers,
    plot_budgets,
    plot_choices,
    scores_table,
    side_by_side,
)
from rsft_lib.display.model.checkpoint_tables import outputs_table, tensors_table
from rsft_lib.generation.answer import Answer, chosen_mode, is_correct, loops, obeyed, score, well_formed
from rsft_lib.generation.generate import generate, generate_modes, open_speaker
from rsft_lib.generation.inference_engines import Sampling, open_engine
from rsft_lib.generation.intervals import wilson
from rsft_lib.tokenizer.chat import prompt_ids
from rsft_lib.tokenizer.dialect import QWEN3
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

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


def scripted(model, folder, *texts):
    """A copy of `model` in `folder` that continues each token with its successor in `texts`."""
    tokenizer = load_tokenizer(model)
    chains = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    seen = sorted({token for chain in chains for token in chain})
    network = Qwen2ForCausalLM.from_pretrained(model)
    for name, weight in network.named_parameters():
        if not name.endswith("norm.weight"):
            weight.data.zero_()
    for direction, token in enumerate(seen):
        network.model.embed_tokens.weight.data[token, direction] = 1
    for now, then in (pair for chain in chains for pair in zip(chain, chain[1:], strict=False)):
        network.lm_head.weight.data[then, seen.index(now)] = 1
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_answer_begins_with_the_requested_control_token_and_stops_at_eos(model, tmp_path):
    end = demo.EOS
    speaker = scripted(model, tmp_path, f"<think> two</think> three{end}", f"<short> three{end}")
    assert generate(speaker, QUESTIONS, "think") == [Answer("<think> two</think> three", 4, True)] * 3
    assert generate(speaker, QUESTIONS, "short") == [Answer("<short> three", 2, True)] * 3


def test_with_no_mode_the_model_writes_the_control_token_itself(model, tmp_path):
    speaker = scripted(model, tmp_path, f"<｜Assistant｜><short> three{demo.EOS}")
    assert generate(speaker, QUESTIONS[:1], None) == [Answer("<short> three", 2, True)]


def test_a_misspelt_mode_is_refused(model):
    with pytest.raises(ValueError, match="mode is 'thnk'; choose one of 'think', 'short', None, 'other'"):
        generate(model, QUESTIONS[:1], "thnk")


def test_a_truncated_answer_has_no_eos(model, tmp_path):
    speaker = scripted(model, tmp_path, "<think> two two")
    assert generate(speaker, QUESTIONS[:1], "think", max_new_tokens=3) == [Answer("<think> two two two", 4, False)]


@pytest.mark.parametrize("block", ["trained", "masked"])
def test_a_model_is_asked_in_the_dialect_and_with_the_block_that_its_export_recorded(model, tmp_path, block):
    """The model answers ` /no_think` by an empty block only if that was trained; else the prompt has to contain it."""
    empty = "<think>\n\n</think>\n\n"
    ids = load_tokenizer(model)(empty, add_special_tokens=False)["input_ids"]
    speaker = scripted(model, tmp_path, "<｜Assistant｜><think> two</think> three" + demo.EOS)  # whatever it is asked
    write_manifest(speaker, {"made_by": "export", "dialect": "qwen3", "empty_block": block})
    found = generate_modes(speaker, ["two", "two /think"], ["think", "short"], Sampling(6))
    assert [a.text for a in found["think"]] == ["<think> two</think> three"] * 2
    assert obeyed(found["think"], "think") == 1
    if block == "masked":
        assert all(a.text.startswith(empty) and a.tokens > len(ids) for a in found["short"])
        assert obeyed(found["short"], "short") == 1
    else:
        assert [a.text for a in found["short"]] == ["<think> two</think> three"] * 2
        assert obeyed(found["short"], "short") == 0
    (row_think, row_short) = obedience_table(found).rows
    assert row_think == ("think", 2, 0, 0, "100.0%") and row_short[-1] == ("100.0%" if block == "masked" else "0.0%")


@pytest.mark.parametrize(
    ("text", "mode", "good"),
    [
        ("<think>\nhm\n</think>\n\n4", "think", True),
        ("<think>\n\n</think>\n\n4", "short", True),
        ("<think></think>4", "short", True),
        ("<think>\nhm\n</think>\n\n", "think", False),
        ("<think>\n\n</think>\n\n", "short", False),
        ("<think>\nhm", "think", False),
        ("<think>\n\n", "neither", False),
        ("4", "neither", False),
        ("<short>4", "neither", False),
        ("<think>\n\n</think>\n\n<think>\nhm\n</think>\n\n4", "short", False),
    ],
)
def test_in_qwen3s_dialect_the_think_block_shows_the_mode(text, mode, good):
    answer = Answer(text, 9, True, QWEN3)
    assert chosen_mode(answer) == mode and well_formed(answer, mode) == good
    assert not any(well_formed(answer, other) for other in {"think", "short"} - {mode})
    assert not well_formed(Answer(text, 9, False, QWEN3), mode)


def test_batching_with_longer_prompts_does_not_change_an_answer(model):
    together = generate(model, QUESTIONS, "think", max_new_tokens=12)
    alone = [generate(model, [question], "think", max_new_tokens=12)[0] for question in QUESTIONS]
    in_pairs = generate(model, QUESTIONS, "think", max_new_tokens=12, batch_size=2)
    assert together == alone == in_pairs
    assert len({answer.text for answer in alone}) > 1, "the answers must differ"


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
def test_an_answer_is_well_formed_if_it_has_its_control_tokens_once_and_text_after_them(text, mode, good):
    assert well_formed(Answer(text, tokens=9, ended=True), mode) == good
    assert not well_formed(Answer(text, tokens=9, ended=False), mode)


@pytest.mark.parametrize(
    ("text", "expected", "correct"),
    [
        (THOUGHT, "two", True),
        ("<think>Answer: three</think>\n\nAnswer: two\n", "two", True),
        ("<think>Answer: two", "two", False),  # the chain of thought was cut off
        ("<think>\nAnswer: two\n</think>\n\nso three", "two", False),
        ("<short>two", "two", False),
        ("<short>so it is\n#### 1,000", "1000.0", True),
        (r"<short>$\boxed{\frac{1}{2}}$", "0.5", True),
        ("<short>#### 7", "3 + 4 = 7\n#### 7", True),
    ],
)
def test_correctness_depends_on_the_final_answer_after_the_thoughts(text, expected, correct):
    assert is_correct(Answer(text, tokens=9, ended=True), expected) == correct


def test_a_score_has_accuracy_well_formed_share_and_mean_length():
    right, wrong = Answer("<short>Answer: two", 3, True), Answer("<short>Answer: three", 3, True)
    endless, silent = Answer("<short>Answer: two two", 8, False), Answer("<short>two", 2, True)
    scores = score([right, wrong, endless, silent], ["two"] * 4, "short")
    assert scores == {"accuracy": 0.25, "well_formed": 0.75, "tokens": 4.0, "cut_off": 1, "loops": 0.0}
    half_known = score([right, wrong, endless, silent], ["two", None, None, "two"], "short")
    assert half_known == scores | {"accuracy": 0.5}
    unknown = score([right, wrong, endless, silent], [None] * 4, "short")
    assert unknown == {name: value for name, value in scores.items() if name != "accuracy"}


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("<think>\nSo it is two. " + "Wait, let me check that again. " * 4, True),
        ("<think>\nSo it is two. " * 9 + "Wait, let me check that again. " * 3, False),
        ("<think>\nSo it is two. " + "Wait, let me check that again. " * 4 + "Wait, le", True),  # cut off anywhere
        ("<think>\n" + "Wait, let me check that again. " * 9 + "It is two, after all.", False),
        ("<short>1" + "0" * 64, True),
        ("<short>1" + "0" * 63, False),
        ("<short>0, 0, 0, 0, 0, 0, 0, 0", False),
        ("".join(f"Then {number} follows. " for number in range(100)), False),
        ("", False),
    ],
)
def test_an_answer_that_ends_in_the_same_passage_again_and_again_loops(text, repeated):
    assert loops(Answer(text, 9, False)) == loops(Answer(text, 9, True)) == repeated
    assert (
        score([Answer(text, 9, False), Answer("<short>Answer: two", 9, True)], [None] * 2, None)["loops"]
        == repeated / 2
    )


def test_answers_and_references_must_be_equally_many():
    with pytest.raises(ValueError):
        score([Answer("<short>Answer: two", 3, True)], ["two", "three"], "short")


def test_all_modes_are_answered_with_the_model_loaded_once(model, tmp_path, monkeypatch):
    speaker = scripted(
        model, tmp_path, f"<｜Assistant｜><think> two</think> three{demo.EOS}", f"<short> four{demo.EOS}"
    )
    loads, load = [], Qwen2ForCausalLM.from_pretrained
    monkeypatch.setattr(
        "rsft_lib.generation.inference_engines.AutoModelForCausalLM.from_pretrained",
        lambda f, **how: loads.append(f) or load(f),
    )
    found = generate_modes(speaker, QUESTIONS, ["think", "short", None], Sampling(20))
    assert found["think"] == found[None] == [Answer("<think> two</think> three", 4, True)] * 3
    assert found["short"] == [Answer("<short> four", 2, True)] * 3
    assert len(loads) == 1


def test_answers_are_seen_while_they_are_written_side_by_side_and_can_be_stopped(model, tmp_path):
    speaker = open_speaker(
        scripted(model, tmp_path, f"<think> two two</think> three{demo.EOS}", f"<short> four{demo.EOS}")
    )
    asked, seen = [("two", "think"), ("two plus three", "short")], []
    answers = speaker.answers(asked, Sampling(20), lambda found: seen.append(found) or False)
    assert answers[1].text == "<short> four" and answers == [speaker.answers([one], Sampling(20))[0] for one in asked]
    assert seen[-1] == answers and [len({a.tokens for a in pair}) for pair in seen[:1]] == [1]
    texts = [pair[0].text for pair in seen]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False)) and len(texts) > 2
    stopped = speaker.answers(asked, Sampling(20), lambda found: True)
    assert [answer.tokens for answer in stopped] == [2, 2]


def test_sampling_is_reproducible_and_its_frequencies_follow_the_temperature(model):
    """At temperature t the share of a token is softmax(logits / t) of a forward pass."""
    ids = prompt_ids(load_tokenizer(model), [{"role": "user", "content": "two"}])
    write, t = open_engine(model, "transformers", batch_size=2000), 0.1
    with torch.no_grad():
        logits = Qwen2ForCausalLM.from_pretrained(model)(torch.tensor([ids])).logits[0, -1]
    expected = (logits / t).softmax(-1)
    drawn = torch.tensor(write([ids] * 2000, Sampling(1, t, seed=1)))[:, 0]
    counts = torch.bincount(drawn, minlength=len(expected)) / 2000
    top = expected.topk(5).indices
    assert expected[top[0]] > 0.2, "it would be rare at temperature 1"
    assert counts[top].tolist() == pytest.approx(expected[top].tolist(), abs=0.03)
    small = [write([ids] * 10, Sampling(4, 1.0, seed)) for seed in (1, 1, 2)]
    assert small[0] == small[1] != small[2]


def test_what_a_prompt_samples_depends_neither_on_its_batch_nor_on_its_place(model):
    tokenizer = load_tokenizer(model)
    ids = [prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in (*QUESTIONS, QUESTIONS[0])]
    whole = open_engine(model, "transformers")(ids, Sampling(12, 1.0, seed=1))
    assert open_engine(model, "transformers", batch_size=1)(ids, Sampling(12, 1.0, seed=1)) == whole
    assert open_engine(model, "transformers")(ids[2::-1], Sampling(12, 1.0, seed=1)) == whole[2::-1]
    assert whole[0] != whole[3], "the same prompt, asked twice"


class Vllm(types.ModuleType):
    """A stand-in for the parts of vLLM that `engines` uses; it answers with transformers."""

    def __init__(self):
        super().__init__("vllm")
        self.__spec__ = importlib.util.spec_from_loader("vllm", loader=None)
        self.calls = []
        outer = self

        class SamplingParams:
            def __init__(self, **how):
                self.how = how

        class LLM:
            def __init__(self, model, dtype):
                outer.calls.append((model, dtype))
                self.write = open_engine(model, "transformers")

            def generate(self, prompts, how):
                outer.calls.append(how[0].how)
                written = self.write([p["prompt_token_ids"] for p in prompts], Sampling(how[0].how["max_tokens"]))
                assert len(how) == len(prompts) == len({one.how["seed"] for one in how})
                one = types.SimpleNamespace
                return [one(outputs=[one(token_ids=tuple(ids))]) for ids in written]

        self.LLM, self.SamplingParams = LLM, SamplingParams


def test_vllm_gets_token_ids_and_returns_the_same_answers(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", Vllm())
    modes, sampling = ["think", "short", None], Sampling(6, 0.0, seed=3)
    found = generate_modes(model, QUESTIONS, modes, sampling, engine="vllm")
    assert found == generate_modes(model, QUESTIONS, modes, sampling, engine="transformers")
    (loaded, dtype), *asked = sys.modules["vllm"].calls
    assert (loaded, dtype) == (str(model), "float32") and len(asked) == 3
    eos = load_tokenizer(model).eos_token_id
    seed = asked[0].pop("seed")
    assert 0 <= seed < 2**63 and seed not in (asked[1]["seed"], asked[2]["seed"])
    assert asked[0] == {"temperature": 0.0, "max_tokens": 6, "stop_token_ids": [eos], "detokenize": False}


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_budget_closes_thoughts_that_go_on_in_either_engine(model, tmp_path, monkeypatch, engine):
    monkeypatch.setitem(sys.modules, "vllm", Vllm())
    endless = scripted(
        model, tmp_path, "<｜Assistant｜><think> two two", f"<short></think> three{demo.EOS}", "</think> three"
    )
    whole = generate_modes(endless, QUESTIONS, ["think", "short", None], Sampling(9), engine)
    found = generate_modes(endless, QUESTIONS, [*whole], Sampling(9, budget_tokens=4), engine)
    closed = [Answer("<think> two two two two</think> three", 7, True)] * 3
    assert found == {"think": closed, "short": whole["short"], None: closed}
    assert well_formed(closed[0], "think") and not whole["think"][0].ended
    assert generate_modes(endless, QUESTIONS, [*whole], Sampling(9, budget_tokens=9), engine) == whole


def test_the_curve_asks_with_a_quarter_to_twice_the_median_thoughts_and_shows_accuracy(model, tmp_path):
    endless = scripted(model, tmp_path, "<think> two two", f"</think>Answer: three{demo.EOS}")
    speaker, sampling, expected = open_speaker(endless), Sampling(20), ["three", "three", None]
    whole = speaker.in_modes(QUESTIONS, ["think"], sampling)
    within = speaker.within_budgets(QUESTIONS, whole["think"], sampling)
    assert [*within] == [5, 10, None] and within[None] == whole["think"], "20 tokens are the limit, 40 more than that"
    for budget in (5, 10):
        closed = "<think>" + " two" * budget + "</think>Answer: three"
        assert [answer.text for answer in within[budget]] == [closed] * 3
    rows = budgets_table(within, expected).rows
    assert [row[:2] for row in rows] == [("5", "100.0%"), ("10", "100.0%"), ("none", "0.0%")]
    others = {"before": {"think": {"accuracy": 0.9}, "think within 7 tokens": {"accuracy": 0.5}}}
    lines = plot_budgets(within, whole, expected, others).axes[0].get_lines()
    drawn = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in lines}
    assert drawn["before"] == (7, 0.5) and (5, 10, 1, 1) in drawn.values()
    limited = speaker.within_budgets(QUESTIONS, within[5], Sampling(20, budget_tokens=5))
    assert [*limited] == [1, 2, 5] and limited[5] == within[5]
    assert speaker.within_budgets(QUESTIONS, [], sampling) == {} and not budgets_table({}, expected).rows
    assert plot_budgets({}, whole, expected).axes


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_engines_use_the_dtype_of_the_model(model, tmp_path, monkeypatch, dtype, key):
    """By default vLLM loads an fp32 model in bf16, and its answers differ from those of transformers."""
    Qwen2ForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    load_tokenizer(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    stated = {name: value for name, value in config.items() if name != "dtype"} | ({key: dtype} if key else {})
    (tmp_path / "config.json").write_text(json.dumps(stated))
    monkeypatch.setitem(sys.modules, "vllm", stub := Vllm())
    opened, load = [], AutoModelForCausalLM.from_pretrained

    def noted(folder, **how):
        opened.append(load(folder, **how))
        return opened[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    open_engine(tmp_path, "vllm")
    open_engine(tmp_path, "transformers")
    assert stub.calls == [(str(tmp_path), dtype)]
    assert {str(loaded.dtype) for loaded in opened} == {f"torch.{dtype}"}


def test_generation_config_does_not_change_answers(model, tmp_path):
    """Only transformers reads it, so a repetition penalty there would apply to one engine only."""
    folder = shutil.copytree(model, tmp_path / "model")
    expected = generate(folder, QUESTIONS, "think", max_new_tokens=12)
    penalty = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0)
    penalty.save_pretrained(folder)
    assert generate(folder, QUESTIONS, "think", max_new_tokens=12) == expected


@pytest.mark.parametrize("pad", [None, "<pad>"])
def test_a_missing_pad_token_or_one_without_an_embedding_row_is_harmless(model, tmp_path, pad):
    folder, tokens = shutil.copytree(model, tmp_path / "model"), len(load_tokenizer(model))
    smaller = Qwen2ForCausalLM.from_pretrained(model)
    smaller.resize_token_embeddings(tokens)
    smaller.save_pretrained(folder)
    expected = generate(folder, QUESTIONS, "think", max_new_tokens=12)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": pad}), encoding="utf-8")
    assert load_tokenizer(folder).pad_token_id == (None if pad is None else tokens)
    assert generate(folder, QUESTIONS, "think", max_new_tokens=12) == expected


def test_auto_selects_vllm_only_with_a_gpu_and_only_an_explicit_vllm_must_be_installed(model, monkeypatch):
    with pytest.raises(ValueError, match="engine is 'vllm', which is not installed"):
        open_engine(model, "vllm")
    with pytest.raises(ValueError, match="engine is 'vlm'; choose"):
        open_engine(model, "vlm")
    monkeypatch.setitem(sys.modules, "vllm", stub := Vllm())
    open_engine(model, "auto")
    assert not stub.calls, "there is no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stub, "LLM", lambda model, dtype: stub.calls.append(model))
    open_engine(model, "auto")
    assert stub.calls == [str(model)]


ANSWERS = {
    "think": [Answer(THOUGHT, 12, True), Answer("<think> <script>alert(1)</script> 解", 7, False)],
    "short": [Answer("<short>Answer: three", 3, True), Answer("<short>Answer: $two$", 3, True)],
    None: [Answer("<short>Answer: two", 3, True), Answer("Answer: two", 2, True)],
}
EXPECTED = ["two", "two"]


def test_both_modes_are_shown_side_by_side_as_text(model):
    page = side_by_side(["How <b>many</b>?", "And $x$?"], ANSWERS, 1, EXPECTED)._repr_html_()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; 解" in page and "$x$" not in page
    assert "cut off" in page and "not well-formed" in page and "free choice" in page
    first = side_by_side(["How <b>many</b>?", "And $x$?"], ANSWERS, 0, EXPECTED)
    assert "<b>many" not in first._repr_html_() and "How <b>many</b>?" in repr(first)
    assert [mark for mark in re.findall("✓ correct|✗ wrong", repr(first))] == ["✓ correct", "✗ wrong", "✓ correct"]
    with pytest.raises(ValueError, match="no question 2"):
        side_by_side(["a", "b"], ANSWERS, 2, EXPECTED)


def test_a_question_without_a_known_answer_is_shown_without_a_verdict():
    view = side_by_side(["How many?"], {"think": ANSWERS["think"][:1]}, 0, [None])
    for page in (view._repr_html_(), repr(view)):
        assert "How many?" in page and "Answer: two" in page
        assert not re.search("expected|correct|wrong", page)


def test_a_very_long_answer_is_shortened_in_the_middle():
    thoughts = "<think>" + "hm " * 20_000 + "</think>Answer: two"
    view = side_by_side(["q"], {"think": [Answer(thoughts, 20_000, True)]}, 0, ["two"])
    assert len(view._repr_html_()) < 10_000 and "more characters" in view._repr_html_() and "✓ correct" in repr(view)


def test_scores_and_choices_are_listed_by_mode():
    rows = {row[0]: row[1:] for row in scores_table(ANSWERS, EXPECTED).rows}
    assert rows["think"][0] == "50.0%" and rows["think"][2:] == (0.5, 1, 0, "9.5", 9, 12)
    assert rows["free choice"][0] == "100.0%" and rows["free choice"][2] == 0.5
    assert scores_table(ANSWERS, [None, None]).rows[0][1:3] == ("–", "–")
    assert [row[:3] for row in choices_table(ANSWERS, EXPECTED).rows] == [
        ("think", 0, 0.0), ("short", 1, 0.5), ("neither", 1, 0.5),
    ]  # fmt: skip
    assert [chosen_mode(answer) for answer in ANSWERS[None]] == ["short", "neither"]


def test_a_model_without_modes_is_asked_once_and_its_tables_have_one_row(model):
    answers = {"other": [Answer("Answer: two", 3, True), Answer("<short>Answer: two", 4, True)]}
    assert generate_modes(model, QUESTIONS, ["other"], Sampling(20)) == {
        "other": generate_modes(model, QUESTIONS, [None], Sampling(20))[None]
    }
    (row,) = scores_table(answers, EXPECTED).rows
    assert row[0] == "answers" and row[3] == 0.5, "a plain answer must not contain a control token"
    assert choices_table(answers, EXPECTED).rows == [] and "has no modes" in repr(choices_table(answers, EXPECTED))
    assert "free choice" not in side_by_side(["q", "q"], answers, 0, EXPECTED)._repr_html_()
    (text,) = plot_answers(answers, EXPECTED).axes[0].get_legend().texts
    assert text.get_text() == "answers: 100%, 4 tokens"


def test_the_plot_has_accuracy_against_tokens_for_each_mode_or_form_without_references():
    costs, lengths = plot_answers(ANSWERS, EXPECTED).axes
    assert len(lengths.collections) == 3 and [t.get_text() for t in lengths.get_yticklabels()][0] == "think"
    points = {bar.get_label(): bar.lines[0].get_xydata()[0].tolist() for bar in costs.containers}
    assert points == {
        "think: 50%, 10 tokens": [9.5, 0.5], "short: 50%, 3 tokens": [3.0, 0.5],
        "free choice: 100%, 2 tokens": [2.5, 1.0],
    }  # fmt: skip
    unknown = plot_answers(ANSWERS, [None, None]).axes[0]
    assert "well-formed" in unknown.get_title("left")
    assert [bar.lines[0].get_ydata()[0] for bar in unknown.containers] == [0.5, 1.0, 0.5]


def test_a_line_leads_from_other_checkpoints_to_the_point_of_each_mode():
    names = dict.fromkeys(["think", "short", "free choice"])
    others = {
        name: {mode: {"accuracy": y, "tokens": x} for mode in names} for name, x, y in (("a", 4, 0.1), ("b", 6, 0.3))
    }
    costs = plot_answers(ANSWERS, EXPECTED, others).axes[0]
    lines = [line.get_xydata().tolist() for line in costs.lines if len(line.get_xydata()) == 3]
    assert lines == [[[4, 0.1], [6, 0.3], end] for end in ([9.5, 0.5], [3.0, 0.5], [2.5, 1.0])]
    assert sorted(text.get_text() for text in costs.texts) == ["a", "a", "a", "b", "b", "b"]
    with pytest.raises(ValueError, match="b: no accuracy in mode short; run notebook 07 on it"):
        plot_answers(ANSWERS, EXPECTED, others | {"b": {"think": others["b"]["think"]}})


@pytest.mark.parametrize(
    ("correct", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_intervals_are_wilsons(correct, count, low, high):
    """The last case is the example of Newcombe (1998), https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857>3.0.CO;2-E."""
    assert wilson(correct, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_a_verification_report_is_shown_by_kind_of_tensor_and_by_output():
    def tensor(name, same=True, norm=2.0):
        return {"name": name, "shape": [4, 3], "dtype": "float32", "norm": norm, "same": same}

    report = {
        "tensors": [tensor("lm_head.weight"), tensor("model.layers.0.b", False, 1.0), tensor("model.layers.11.b")],
        "next_tokens": [{"token": " <b>\n", "transformers": 1.5, "megatron": 1.25}], "logit_difference": 0.25,
        "text": {"transformers": "a\nb", "megatron": "c"}, "sentence": "How?",
    }  # fmt: skip
    assert tensors_table(report).rows == [
        ("lm_head.weight", "4 × 3", "float32", "2", "1 of 1"),
        ("model.layers.*.b", "4 × 3", "float32", "1 to 2", "1 of 2"),
    ]
    table = outputs_table(report)
    assert table.rows == [("' <b>\\n'", "1.50000", "1.25000")] and "2.5e-01" in table.note and "a↵b" in table.note


def test_the_choice_is_drawn_by_difficulty_with_the_accuracy_of_each_mode():
    answers = {
        "think": [Answer("<think>\nx\n</think>\n\nAnswer: 4", 20, True)] * 4,
        "short": [Answer("<short>Answer: 4", 4, True)] * 4,
        None: [Answer("<short>Answer: 4", 4, True)] * 2 + [Answer("<think>\nx\n</think>\n\nAnswer: 4", 20, True)] * 2,
    }
    shares, accuracies = plot_choices(answers, ["4", "4", "5", "4"], [1, 1, 3, 3]).axes
    assert shares.containers[0].lines[0].get_ydata().tolist() == [0, 1]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["1", "3"]
    assert [container.lines[0].get_ydata().tolist() for container in accuracies.containers] == [[1, 0.5]] * 3
    assert accuracies.get_legend_handles_labels()[1] == ["think", "short", "free choice"]
