"""Whole projects, headless: a new one on real inputs, and one that is killed and started again.

RSFT_LONG_TESTS=1 kills it five times instead of once, and goes on to the last notebook instead of to the training.
"""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from browser import copy_project
from processes import survivors, wait_until
from real import LONG, REAL, needs_real
from support import all_tensors
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rsft_lib import demo
from rsft_lib.chain.project_file import NOTEBOOKS, PAIRS, SWEEP
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.training.metrics import read_metrics

STEPS = 12
KILLS, LAST = (5, "08") if LONG else (1, "05")
SETTINGS = {
    "seq_length": 512, "nproc": 2,
    "03_build_dataset": {"held_out": 0.2},
    "05_train": {**demo.TINY, "train_iters": STEPS, "save_interval": 3, "eval_interval": 6},
    "07_export_and_generate": {"questions": 4, "max_new_tokens": 8},
}  # fmt: skip
del SETTINGS["05_train"]["seq_length"]  # taken from the data


def start(copy: Path, *arguments: str) -> subprocess.Popen:
    """`python -m rsft_lib.project` in a copy of the project."""
    command = [sys.executable, "-m", "rsft_lib.project", *arguments]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def done(copy: Path, *arguments: str) -> str:
    """What the command prints; it must succeed."""
    process = start(copy, *arguments)
    shown, errors = process.communicate(timeout=3600)
    assert process.returncode == 0, shown + errors
    return shown


def shortest(source: Path, target: Path, rows: int) -> None:
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        target.write_text("".join(sorted(file, key=len)[:rows]), encoding="utf-8")


def random_r1(folder: Path) -> None:
    """A random Qwen2 with R1's tokenizer, in the layout of a model folder from the Hub."""
    real = Path(REAL) / "tokenizers" / "r1-distill-qwen"
    named = json.loads((real / "config.json").read_text())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=named["vocab_size"], hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=named["bos_token_id"], eos_token_id=named["eos_token_id"],
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in real.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


@needs_real
def test_a_new_project_goes_through_all_notebooks_by_one_command_with_four_values_typed(tmp_path):
    copy, own = copy_project(tmp_path / "copy"), tmp_path / "own"
    random_r1(own / "model")
    for name, file in (("long", "long_planbench_r1.jsonl.gz"), ("short", "short_gsm8k_train.jsonl")):
        shortest(Path(REAL) / "data" / file, own / f"{name}.jsonl", 12)
    done(copy, "new", "mine", str(own / "model"), str(own / "long.jsonl"), str(own / "short.jsonl"))
    done(copy, "run", "mine")
    folder = copy / "outputs" / "mine"
    model = AutoModelForCausalLM.from_pretrained(folder / "07_export_and_generate" / "mine")
    assert model.config.vocab_size == 151_936 and model.dtype == torch.bfloat16
    state = done(copy, "status", "mine")
    states = {name: "missing" if name in (SWEEP, PAIRS) else "done" for name in NOTEBOOKS}
    assert dict(line.split()[:2] for line in state.splitlines()[2:]) == states
    page = (folder / "executed" / "report.html").read_text()
    wanted = ("Verify", "The loss mask", "git commit", "Did it learn?", "Each mode", "Where the loss is", "image/png")
    assert [text for text in wanted if text not in page] == []
    again = done(copy, "run", "mine").splitlines()
    assert again[: len(NOTEBOOKS) - 2] == [f"{name}: done before" for name in NOTEBOOKS if states[name] == "done"]
    by_hand = nbformat.read(folder / "executed" / "05_train.ipynb", 4).cells[2].source
    assert by_hand.startswith("# Parameters\nproject = ") and by_hand.count("\n") == 2, "one value typed"


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the kit with two equal projects, `whole` and `killed`."""
    copy = copy_project(tmp_path / "copy")
    demo.make_model(copy / "own" / "model", seed=1)
    demo.make_sources(copy / "own" / "answers", 60, seed=1)
    data = {name: f"own/answers/{name}.jsonl" for name in ("long", "short")}
    for name in ("whole", "killed"):
        (copy / "projects" / f"{name}.yaml").write_text(json.dumps({"model": "own/model", **data, **SETTINGS}))
    return copy


def kill(process: subprocess.Popen, everything: bool) -> None:
    """Kill the command alone, whose kernel and ranks then end by themselves, or all of them at once."""
    below = psutil.Process(process.pid).children(recursive=True) if everything else []
    process.kill()
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def finished(folder: Path) -> dict[str, str]:
    """Notebook -> when it was done."""
    records = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("0*/status.json")}
    return {name: record["finished"] for name, record in records.items() if record["status"] == "done"}


def test_a_project_killed_at_any_moment_and_started_again_ends_the_same_and_does_nothing_twice(copy):
    began = time.monotonic()
    done(copy, "run", "whole", "--to", LAST)
    seconds, rng, before = time.monotonic() - began, random.Random(), {}
    whole, killed = copy / "outputs" / "whole", copy / "outputs" / "killed"
    for number in range(KILLS):
        process = start(copy, "run", "killed", "--to", LAST)
        time.sleep(rng.uniform(0.1, 1.5 if LONG else 0.8) * seconds / KILLS)
        kill(process, everything=bool(number % 2))
        process.communicate()
        wait_until(lambda: not survivors(killed), 900, "processes are left")
        assert before.items() <= finished(killed).items(), "a notebook that was done ran again"
        before = finished(killed)
    shown = done(copy, "run", "killed", "--to", LAST)
    assert before.items() <= finished(killed).items()
    assert {name for name in NOTEBOOKS if f"{name}: done before" in shown} == before.keys()
    assert list(killed.rglob(".*.tmp-*")) == []
    for file in ("03_build_dataset/dataset/train.jsonl", "04_tokenize_and_inspect/tokens/*train*/text_document.bin",
                 "04_tokenize_and_inspect/tokens/*train*/loss_mask.bin"):  # fmt: skip
        assert next(killed.glob(file)).read_bytes() == next(whole.glob(file)).read_bytes(), file
    losses = [[(one["iteration"], one["loss"]) for one in read_metrics(run / "05_train")] for run in (whole, killed)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
    first, second = (all_tensors(newest(run / "05_train")) for run in (whole, killed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
