"""R1's own tokenizer and config, real traces and GSM8K: RSFT_REAL_DATA=... pytest tests/test_real_input.py"""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rsft_lib.artifact import newest
from rsft_lib.chat import encode
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.generate import generate
from rsft_lib.launch import launch_training
from rsft_lib.tokenizer import load_tokenizer, patch_tokenizer
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

ROOT = os.environ.get("RSFT_REAL_DATA")
pytestmark = pytest.mark.skipif(not ROOT, reason="RSFT_REAL_DATA names no folder with real inputs")
LONG, SHORT, LENGTH = 16, 150, 4096


@pytest.fixture(scope="module")
def real() -> Path:
    return Path(ROOT)


@pytest.fixture(scope="module")
def chain(real, tmp_path_factory) -> Path:
    """A folder with every result of the chain: model, tokenizer, megatron, hybrid, tokens, run, out."""
    folder = tmp_path_factory.mktemp("real")
    original = real / "tokenizers" / "r1-distill-qwen"
    shutil.copytree(original, folder / "model")
    config = json.loads((original / "config.json").read_text())
    # R1's own config, made narrow enough to train here; the vocabulary keeps its 151,936 rows.
    config |= {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    del config["layer_types"]
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(folder / "model")

    patch_tokenizer(folder / "model", folder / "tokenizer", {"<|quad_start|>": "<short>"})
    convert(folder / "model", folder / "megatron")
    with gzip.open(real / "data" / "long_planbench_r1.jsonl.gz", "rt") as file:
        (folder / "long.jsonl").write_text("".join(line for _, line in zip(range(LONG), file, strict=False)))
    lines = (real / "data" / "short_gsm8k_train.jsonl").read_text().splitlines(keepends=True)
    (folder / "short.jsonl").write_text("".join(lines[:SHORT]))
    build_hybrid(folder / "long.jsonl", folder / "short.jsonl", folder / "hybrid", held_out=0.1, seed=1)
    tokenize(folder / "hybrid" / "train.jsonl", folder / "tokenizer", folder / "tokens", max_length=LENGTH)
    run = TrainConfig(
        checkpoint=str(folder / "megatron"), data=str(folder / "tokens"), output=str(folder / "run"),
        seq_length=LENGTH, global_batch_size=1, train_iters=3, lr=1e-2, precision="fp32", log_interval=1,
    )  # fmt: skip
    launch_training(run, nproc=1)
    export(newest(folder / "run"), folder / "tokenizer", folder / "out")
    return folder


def test_the_control_tokens_are_r1s_and_the_new_one_has_the_old_ones_id(chain, real):
    tokenizer = load_tokenizer(chain / "tokenizer")
    expected = {"<think>": 151648, "</think>": 151649, "<short>": 151650, "<｜Assistant｜>": 151645}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert len(tokenizer) == 151665
    text = (real / "data" / "short_gsm8k_train.jsonl").read_text()[:200_000]
    before = load_tokenizer(real / "tokenizers" / "r1-distill-qwen")
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]


def test_the_trained_tokens_of_every_sample_are_its_answer_and_eos(chain):
    tokenizer, store = load_tokenizer(chain / "tokenizer"), TokenStore(chain / "tokens")
    records = map(json.loads, (chain / "hybrid" / "train.jsonl").read_text().splitlines())
    fitting = (r for r in records if r["mode"] == "short" or len(tokenizer(r["output"])["input_ids"]) < LENGTH - 2000)
    answers = {r["output"] for r in fitting}
    found = set()
    for tokens, mask in (store[i] for i in range(len(store))):
        assert tokens[0] == 151646 and tokens[-1] == 151643  # BOS, EOS
        first = int(mask.argmax())
        assert mask[first:].all() and tokens[first - 1] == 151645  # the header is the last untrained token
        found.add(tokenizer.decode(tokens[first:-1]))
    assert answers <= found


def test_the_stock_template_is_refused_because_it_strips_the_chain_of_thought(real, chain):
    record = json.loads((chain / "long.jsonl").read_text().splitlines()[0])
    messages = [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["response"]},
    ]
    with pytest.raises(ValueError, match="patch the template"):
        encode(load_tokenizer(real / "tokenizers" / "r1-distill-qwen"), messages)


def test_three_steps_train_and_the_export_loads_and_answers(chain):
    metrics = read_metrics(chain / "run")
    assert len(metrics) == 3 and metrics[-1]["loss"] < metrics[0]["loss"] < 13
    before, after = (load_file(chain / name / "model.safetensors") for name in ("model", "out"))
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert after["lm_head.weight"].shape[0] == 151936
    assert not any(torch.equal(before[name], after[name]) for name in before)
    text = "A plan: 12 + 30 = 42.\n<short>数学 is fun<｜end▁of▁sentence｜>"
    found, expected = AutoTokenizer.from_pretrained(chain / "out"), load_tokenizer(chain / "tokenizer")
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    answer, *_ = generate(chain / "out", ["2 + 2 ?"], "short", max_new_tokens=3)
    assert answer.text.startswith("<short>")
