"""Every notebook, headless, with a few steps and problems: pytest tests/test_notebooks.py"""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsft_lib import demo
from rsft_lib.notebook import run
from rsft_lib.paths import ROOT, tokenized

NOTEBOOKS = ROOT / "notebooks"


def test_the_quickstart_goes_from_nothing_to_a_model_that_answers(tmp_path):
    few = {"output": str(tmp_path), "train_iters": 4, "problems": 300, "nproc": 1}
    executed, status = run(NOTEBOOKS / "00_quickstart.ipynb", tmp_path, few)
    assert status == json.loads((tmp_path / "status.json").read_text())
    assert status["scores"].keys() == {"think", "short"}
    assert "loss" in status["summary"] and str(tmp_path / "exported") in status["summary"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").config.vocab_size == 512
    text = "Ben has two apples.<short>Answer: two"
    patched = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert patched.decode(patched(text)["input_ids"]) == text
    assert "image/png" in executed.read_text()


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> tuple[Path, dict]:
    """Notebooks 01 to 07, each from what the ones before it made."""
    folder = tmp_path_factory.mktemp("steps")
    model = demo.make_model(folder / "model", seed=1)
    sources = demo.make_sources(folder / "sources", 200, seed=1)
    place = {name: str(folder / name) for name in ("hybrid", "tiny_Hybrid", "megatron", "run", "out")}
    tokens = {s: str(tokenized(place["hybrid"], s, place["tiny_Hybrid"], 129)) for s in ("train", "heldout")}
    parameters = {
        "01_patch_tokenizer": {"model": str(model), "output": place["tiny_Hybrid"]},
        "02_convert_checkpoint": {"model": str(model), "output": place["megatron"]},
        "03_build_dataset": {
            "long": str(sources / "long.jsonl"), "short": str(sources / "short.jsonl"), "output": place["hybrid"],
            "tokenizer": place["tiny_Hybrid"],
        },
        "04_tokenize_and_inspect": {"data": place["hybrid"], "tokenizer": place["tiny_Hybrid"], "max_length": 129},
        "05_train": {
            "checkpoint": place["megatron"], "data": tokens["train"], "eval_data": tokens["heldout"],
            "output": place["run"], "seq_length": 128, "train_iters": 6, "eval_interval": 3, "nproc": 2,
        },
        "06_loss_curves": {"runs": place["run"], "output": str(folder / "curves")},
        "07_export_and_generate": {
            "run": place["run"], "tokenizer": place["tiny_Hybrid"], "output": place["out"],
            "held_out": f"{place['hybrid']}/heldout.jsonl", "questions": 4, "max_new_tokens": 8,
        },
    }  # fmt: skip
    done = {n: run(NOTEBOOKS / f"{n}.ipynb", folder / "executed", given)[1] for n, given in parameters.items()}
    return folder, done


def test_the_steps_on_their_own_chain_through_their_folders(steps):
    folder, done = steps
    assert {status["status"] for status in done.values()} == {"done"}
    assert done["02_convert_checkpoint"]["differing_tensors"] == []
    assert done["05_train"]["iteration"] == 6
    assert (folder / "curves" / "losses.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.model_type == "qwen2"


def test_a_finished_training_notebook_runs_again_and_finds_it_done(steps):
    folder, done = steps
    config = json.loads((folder / "run" / "config.json").read_text())
    metrics = (folder / "run" / "metrics.jsonl").read_bytes()
    _, again = run(NOTEBOOKS / "05_train.ipynb", folder / "again", config | {"nproc": 2})
    assert again["last_loss"] == done["05_train"]["last_loss"]
    assert (folder / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_run_that_fails_does_not_keep_the_status_of_the_one_before(steps):
    folder, _ = steps
    assert (folder / "run" / "status.json").exists()
    given = {"output": str(folder / "run"), "checkpoint": str(folder / "megatron"), "data": str(folder / "nowhere")}
    with pytest.raises(RuntimeError, match="nowhere does not exist"):
        run(NOTEBOOKS / "05_train.ipynb", folder / "failed", given)
    assert not (folder / "run" / "status.json").exists()
