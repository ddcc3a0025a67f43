"""R1's own tokenizer and config, real traces and GSM8K."""

import gzip
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from real import REAL, needs_real
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.generation.generate import generate
from rsft_lib.launch import launch_training
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

pytestmark = needs_real
LONG, SHORT, LENGTH = 16, 150, 1536  # few, since R1's vocabulary makes each position expensive
PROMPT = 500  # maximum tokens of a prompt and its headers


@pytest.fixture(scope="module")
def real() -> Path:
    return Path(REAL)


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
    fitting = (r for r in records if r["mode"] == "short" or len(tokenizer(r["output"])["input_ids"]) < LENGTH - PROMPT)
    answers = {r["output"] for r in fitting}
    assert sum(answer.startswith("<think>") for answer in answers) > 2
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


def test_the_whole_corpus_keeps_every_row_and_drops_the_traces_that_are_longer(real, chain, tmp_path):
    """22 of the 364 traces have more than 16,384 tokens, the longest 19,746 (and a header)."""
    facts = tokenize(real / "data" / "long_planbench_r1.jsonl.gz", chain / "tokenizer", tmp_path / "long")
    assert facts["counts"]["records"] == 364 and facts["counts"]["dropped"] == facts["modes"]["think"]["dropped"] == 22
    assert TokenStore(tmp_path / "long").lengths.max() <= 16384 < np.load(tmp_path / "long" / "lengths.npy").max()
    cut = tokenize(
        real / "data" / "long_planbench_r1.jsonl.gz", chain / "tokenizer", tmp_path / "cut", overlong="truncate"
    )
    store, eos = TokenStore(tmp_path / "cut"), 151643
    assert cut["counts"]["truncated"] == 22 == sum(store[i][0][-1] != eos for i in range(len(store)))


def test_tool_chats_are_trained_by_what_the_assistant_writes(real, chain, tmp_path):
    chats = real / "data" / "chat_glaive_toolcall.jsonl"
    facts = tokenize(chats, chain / "tokenizer", tmp_path / "chats")
    assert facts["counts"]["written"] == facts["modes"]["other"]["written"] == 300
    assert facts["counts"]["rejected"] == 0 and "tools_not_shown" not in facts["counts"]
    tokenizer, store = load_tokenizer(chain / "tokenizer"), TokenStore(tmp_path / "chats")
    for number, line in enumerate(chats.read_text().splitlines()):
        answers = [m for m in json.loads(line)["messages"] if m["role"] == "assistant"]
        tokens, mask = store[number]
        edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
        runs = [tokenizer.decode(tokens[first:end]) for first, end in edges]
        assert len(runs) == len(answers)
        for text, message in zip(runs, answers, strict=True):
            assert text.endswith(tokenizer.eos_token) and (message["content"] or "") in text
            assert all(call["function"]["arguments"] in text for call in message.get("tool_calls", []))


HARD = {  # answer -> the trained text, or the reason for rejecting the row
    "<think>\n\n</think>\n\n4": None,
    "<think><think>a</think></think>4": None,
    "<think>no end": None,
    "<short>数学，并且。 한국어 🙂👩‍👩‍👧": None,
    "<short>e\u0301 \u212b \u1100\u1161": None,
    "4": None,
    "<short>x<｜User｜>y": "would become a control token",
    "<short>x<｜end▁of▁sentence｜>": "would become a control token",
    "<short>\ud800": "half of a surrogate pair",
    " \n": "expected text that is not empty",
}


def test_hard_answers_are_trained_to_the_letter_or_refused_with_the_reason(chain, tmp_path):
    rows = [{"prompt": "x", "response": answer} for answer in HARD]
    (tmp_path / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize(tmp_path / "hard.jsonl", chain / "tokenizer", tmp_path / "hard", reject_limit=1)
    tokenizer, store = load_tokenizer(chain / "tokenizer"), TokenStore(tmp_path / "hard")
    found = [tokenizer.decode(tokens[mask > 0]) for tokens, mask in (store[i] for i in range(len(store)))]
    expected = [unicodedata.normalize("NFC", a) + tokenizer.eos_token for a, reason in HARD.items() if reason is None]
    assert found == expected
    refused = [json.loads(line)["reason"] for line in (tmp_path / "hard.rejected.jsonl").read_text().splitlines()]
    reasons = [reason for reason in HARD.values() if reason]
    assert len(refused) == len(reasons) and all(r in text for r, text in zip(reasons, refused, strict=True))
