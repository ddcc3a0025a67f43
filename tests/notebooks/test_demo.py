"""The demo's tokenizer, model and problems."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from real import REAL, needs_real
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsft_lib import demo
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.records import read_records
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

TEXTS = [
    "<｜User｜>Anna has two eggs.<｜Assistant｜><think>\nStart: two.\n</think>\n\nAnswer: two<｜end▁of▁sentence｜>",
    "  4711 = x_1;\n\n\tthey're  ok ",
    "数学 🙂 naïve e\u0301",
    "<｜begin▁of▁sentence｜><short> <|quad_start|><|endoftext|>",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return demo.make_model(tmp_path_factory.mktemp("demo") / "model", seed=0)


@pytest.fixture(scope="module")
def problems():
    return list(demo.problems(2000, seed=0))


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_every_way_to_load_the_tokenizer_has_the_same_ids_and_round_trips(model):
    automatic, exact = AutoTokenizer.from_pretrained(model), load_tokenizer(model)
    raw = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert len(automatic) == len(exact) == raw.get_vocab_size()
    for text in TEXTS:
        ids = raw.encode(text, add_special_tokens=False).ids
        assert automatic(text, add_special_tokens=False)["input_ids"] == ids
        assert exact(text, add_special_tokens=False)["input_ids"] == ids
        assert exact.decode(ids) == automatic.decode(ids) == raw.normalizer.normalize_str(text)


def test_eos_and_padding_are_the_same_token_as_in_r1(model):
    tokenizer = load_tokenizer(model)
    assert tokenizer.bos_token == demo.BOS
    assert tokenizer.pad_token == tokenizer.eos_token == demo.EOS
    assert tokenizer.chat_template == demo.R1_CHAT_TEMPLATE


def test_every_number_is_one_token_in_any_context(model, problems):
    tokenizer = load_tokenizer(model)
    numbers = {tokenizer(f" {number}", add_special_tokens=False)["input_ids"][0] for number in demo.NUMBERS}
    assert len(numbers) == len(demo.NUMBERS)
    for problem in problems[:50]:
        for text in (problem["problem"], problem["think"]):
            words = re.findall("|".join(rf"\b{number}\b" for number in demo.NUMBERS), text)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert sum(i in numbers for i in ids) == len(words)


def test_the_model_is_a_qwen2_like_r1_divisible_by_tp_2_and_pp_4(model):
    loaded, config = AutoModelForCausalLM.from_pretrained(model), json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["rms_norm_eps"] == 1e-6 and config["rope_parameters"]["rope_theta"] == 10_000
    assert loaded.dtype.itemsize == 4 and loaded.model.layers[0].self_attn.q_proj.bias is not None
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert loaded.lm_head.weight.shape[0] == 512 > len(load_tokenizer(model)), "rows without a token, as in R1"
    assert loaded.config.num_key_value_heads < loaded.config.num_attention_heads
    assert loaded.config.num_key_value_heads % 2 == loaded.config.num_hidden_layers % 4 == 0
    assert 1e6 < sum(parameter.numel() for parameter in loaded.parameters()) < 4e6


def test_outputs_depend_on_the_seed_only(model, tmp_path):
    again, other = demo.make_model(tmp_path / "again", seed=0), demo.make_model(tmp_path / "other", seed=1)
    assert hashes(again) == hashes(model)
    assert hashes(other)["model.safetensors"] != hashes(model)["model.safetensors"]
    sources = [demo.make_sources(tmp_path / name, 20, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert hashes(sources[0]) == hashes(sources[1])
    assert hashes(sources[0])["long.jsonl"] != hashes(sources[2])["long.jsonl"]


def test_every_answer_follows_from_the_problem(problems):
    for problem in problems:
        first, *changes, _ = re.split(r"[.] ?", problem["problem"])
        total = demo.NUMBERS.index(first.split()[2])
        for change in changes:
            _, *verb, number = change.split()
            assert " ".join(verb) in demo.GAINS + demo.LOSSES
            total += demo.NUMBERS.index(number) * (1 if " ".join(verb) in demo.GAINS else -1)
        assert problem["answer"] == demo.NUMBERS[total]
        assert problem["short"] == f"Answer: {problem['answer']}"
        assert problem["think"].endswith(f"\n</think>\n\n{problem['short']}")


def test_every_step_of_the_chain_of_thought_is_true_and_continues_the_last(problems):
    value = demo.NUMBERS.index
    for problem in problems:
        start, *steps = problem["think"].removeprefix("<think>\nStart: ").split("\n")[0].rstrip(".").split(". Now: ")
        total = value(start)
        for step in steps:
            left, sign, right, _, result = step.split()
            assert value(left) == total
            total += value(right) if sign == "plus" else -value(right)
            assert value(result) == total and 0 < value(right) < 10
        assert demo.NUMBERS[total] == problem["answer"]


def test_no_two_problems_are_alike_and_none_of_three_or_four_steps_have_the_same_numbers(problems):
    assert len({problem["problem"] for problem in problems}) == len(problems)
    many = [problem["think"] for problem in problems if problem["steps"] > 2]
    assert len(set(many)) == len(many) > 300


def test_difficulty_is_the_number_of_changes_and_most_problems_have_one(problems):
    for problem in problems:
        assert problem["think"].count("Now:") == problem["steps"]
    shares = [sum(problem["steps"] == steps for problem in problems) / len(problems) for steps in demo.STEPS]
    assert shares == pytest.approx(list(demo.STEPS.values()), abs=0.03)


def test_short_answers_may_be_limited_to_easy_problems(tmp_path):
    sources = demo.make_sources(tmp_path / "sources", 50, seed=0, short_up_to=1)
    long, short = ([record for _, record in read_records(sources / f"{n}.jsonl")] for n in ("long", "short"))
    assert len(long) == 50
    assert [r["instruction"] for r in short] == [r["instruction"] for r in long if r["difficulty"] == 1]


def test_too_many_problems_are_an_error():
    with pytest.raises(ValueError, match="60000 problems requested, but at most 20,000 are made"):
        next(demo.problems(60_000, seed=0))


def test_both_sources_have_the_same_problems_and_build_a_trainable_hybrid_dataset(model, tmp_path):
    sources = demo.make_sources(tmp_path / "sources", 20, seed=0)
    long, short = ([record for _, record in read_records(sources / f"{n}.jsonl")] for n in ("long", "short"))
    assert [(r["instruction"], r["answer"]) for r in long] == [(r["instruction"], r["answer"]) for r in short]
    built = build_hybrid(sources / "long.jsonl", sources / "short.jsonl", tmp_path / "hybrid", held_out=0.1, seed=0)
    assert built["counts"] == {"train": {"think": 18, "short": 18}, "heldout": {"think": 2, "short": 2}}
    patch_tokenizer(model, tmp_path / "tokenizer", {"<|quad_start|>": "<short>"})
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for _, record in read_records(tmp_path / "hybrid" / "train.jsonl"):
        user, assistant = {"role": "user", "content": record["instruction"]}, {"role": "assistant"}
        encoded = encode(tokenizer, [user, assistant | {"content": record["output"]}])
        trained = tokenizer.decode([i for i, kept in zip(encoded.ids, encoded.loss_mask, strict=True) if kept])
        assert trained == record["output"] + demo.EOS


@needs_real
def test_template_and_special_tokens_match_the_real_tokenizer():
    real = Path(REAL) / "tokenizers" / "r1-distill-qwen"
    assert (real / "chat_template.jinja").read_text(encoding="utf-8") == demo.R1_CHAT_TEMPLATE
    config = json.loads((real / "tokenizer_config.json").read_text(encoding="utf-8"))
    flags = {token["content"]: token["special"] for token in config["added_tokens_decoder"].values()}
    assert {token: flags[token] for token in demo.SPECIAL} == demo.SPECIAL
