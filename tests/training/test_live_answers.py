"""Answers to held-out questions during training, against those of the exported checkpoints of the same steps."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rsft_lib import demo
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.tokenize import tokenize
from rsft_lib.generation.answer import score
from rsft_lib.generation.answer_files import newest_answers
from rsft_lib.generation.generate import generate_modes
from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.questions import held_out_questions
from rsft_lib.launch import start_training
from rsft_lib.tokenizer.patch import patch_tokenizer
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics, scan_metrics

QUESTIONS, LENGTH, STEPS = 5, 10, (0, 2, 3)
NAMES = {"think": "think", "short": "short", "choice": None}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A run that answers after every second step and after the third, the last."""
    folder = tmp_path_factory.mktemp("answers")
    sources = demo.make_sources(folder / "sources", 60, seed=1)
    demo.make_model(folder / "model", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that answers depend on the question
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "varied")
    patch_tokenizer(folder / "model", folder / "tokenizer", {"<|quad_start|>": "<short>"})
    convert(folder / "varied", folder / "megatron")
    build_hybrid(sources / "long.jsonl", sources / "short.jsonl", folder / "hybrid", held_out=0.2, seed=1)
    for split in ("train", "heldout"):
        tokenize(folder / "hybrid" / f"{split}.jsonl", folder / "tokenizer", folder / split, max_length=513)
    config = TrainConfig(
        **demo.TINY | {"eval_interval": 1000, "lr": 1e-4, "min_lr": 0.0, "save_interval": 1, "train_iters": 3},
        checkpoint=str(folder / "megatron"), data=str(folder / "train"), eval_data=str(folder / "heldout"),
        output=str(folder / "run"), eval_generate_every=2, eval_question_count=QUESTIONS, eval_max_new_tokens=LENGTH,
    )  # fmt: skip
    return folder, config


LAYOUTS = {
    "one rank": (1, {}),
    "three replicas": (3, {"global_batch_size": 3}),
    "tensor and pipeline parallel": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
}


@pytest.mark.parametrize(("nproc", "changes"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_model_answers_during_training_as_its_exported_checkpoints_do(inputs, tmp_path, nproc, changes):
    folder, config = inputs
    start_training(replace(config, output=str(tmp_path / "run"), **changes), nproc).wait()
    questions = held_out_questions(folder / "hybrid" / "heldout.jsonl", QUESTIONS)
    found = scan_metrics(tmp_path / "run")
    records = {record["iteration"]: record for record in (found.start, *found.records)}
    assert not any("think_accuracy" in record for step, record in records.items() if step not in STEPS)
    for step in STEPS:
        checkpoint = tmp_path / "run" / f"iter_{step:07d}" if step else folder / "megatron"
        export(checkpoint, folder / "tokenizer", tmp_path / f"hf{step}")
        expected = generate_modes(tmp_path / f"hf{step}", questions, [*NAMES.values()], Sampling(LENGTH))
        lines = (tmp_path / "run" / "answers" / f"step_{step:07d}.jsonl").read_text(encoding="utf-8").splitlines()
        written = [json.loads(line) for line in lines]
        assert [line["question"] for line in written] == [question.text for question in questions]
        for name, mode in NAMES.items():
            texts = [line["answers"][name]["text"] for line in written]
            assert texts == [answer.text for answer in expected[mode]]
            assert len(set(texts)) > 1 or name == "short", "the questions should matter"
            for metric, value in score(expected[mode], [q.expected for q in questions], mode).items():
                assert records[step][f"{name}_{metric}"] == value
            share = records[step][f"{name}_accuracy"]
            for end in ("low", "high"):  # Wilson's bounds are the shares that are 1.96 standard errors away
                bound = records[step][f"{name}_accuracy_{end}"]
                assert (share - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / QUESTIONS, abs=1e-12)
                assert 0 <= bound <= 1 and (bound <= share if end == "low" else bound >= share)
    assert {path.name for path in (tmp_path / "run").glob(".answers*")} == set()


def test_without_held_out_questions_none_are_asked_and_the_log_says_so(inputs, tmp_path):
    _, config = inputs
    start_training(replace(config, eval_data="", output=str(tmp_path / "run")), 1).wait()
    assert "no questions are asked (eval_generate_every)" in (tmp_path / "run" / "train.log").read_text()
    assert not (tmp_path / "run" / "answers").exists()


def test_answering_does_not_change_the_training(inputs, tmp_path):
    _, config = inputs
    losses = []
    for name, every in (("with", 1), ("without", 0)):
        start_training(replace(config, output=str(tmp_path / name), eval_generate_every=every), 1).wait()
        losses.append([record["loss"] for record in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1]


def test_answers_of_steps_that_were_lost_are_removed_when_a_run_resumes(inputs, tmp_path):
    _, config = inputs
    run = replace(config, output=str(tmp_path / "run"), eval_generate_every=1, save_interval=2, train_iters=2)
    start_training(run, 1).wait()
    answers = tmp_path / "run" / "answers"
    lost = answers / "step_0000009.jsonl"
    lost.write_text((answers / "step_0000002.jsonl").read_text())
    (tmp_path / "run" / ".answers.tmp").mkdir()
    start_training(replace(run, train_iters=3), 1).wait()
    assert sorted(path.name for path in answers.iterdir()) == [f"step_000000{step}.jsonl" for step in (0, 1, 2, 3)]
    assert not (tmp_path / "run" / ".answers.tmp").exists()
    assert newest_answers(tmp_path / "run", 2)[0] == 3


@pytest.mark.parametrize("most", [32, 0], ids=["in smaller batches", "without them"])
def test_without_memory_for_answers_the_training_goes_on(inputs, tmp_path, most):
    _, config = inputs
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom rsft_lib.training import live_answers, train\n"
        "from rsft_lib.training.config import TrainConfig\n"
        "load = live_answers.open_speaker\n"
        "def open_speaker(model, engine, batch_size, dialect):\n"
        f"    if batch_size > {most}: raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "    return load(model, engine, batch_size, dialect)\n"
        "live_answers.open_speaker = open_speaker\n"
        "train.run(TrainConfig.from_file(Path(sys.argv[1])))\n"
    )
    run = replace(config, output=str(tmp_path / "run"), global_batch_size=1)
    (tmp_path / "config.json").write_text(json.dumps(run.to_json()))
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "config.json")]
    done = subprocess.run(command, env=os.environ | rank, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("step 2: held-out questions were not answered" in done.stdout) == (most == 0)
    answered = ["think_accuracy" in record for record in read_metrics(tmp_path / "run")]
    assert answered == ([False, True, True] if most else [False] * 3)
