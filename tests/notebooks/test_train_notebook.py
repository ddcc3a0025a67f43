"""Notebook 05 starts, reattaches to and records a run."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from processes import survivors, wait_until
from support import ROOT, TESTS, random_store, settings, tiny_model

from rsft_lib import demo, launch
from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.chain.project_file import open_project
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common import provenance
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

NOTEBOOK = ROOT / "notebooks" / "05_train.ipynb"
DECLARED = declared_parameters(NOTEBOOK)
PROJECTS = sorted(path.stem for path in (ROOT / "projects").glob("*.yaml"))
SETTINGS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
FOR_MEMORY = {
    "recompute", "recompute_layers", "moments", "gradients", "tensor_parallel", "sequence_parallel",
    "pipeline_parallel", "expert_parallel",
}  # fmt: skip
SECRETS = {"HF_TOKEN": "hf_" + "S" * 34, "WANDB_API_KEY": "5ec7e7" * 6 + "beef"}


def test_the_parameters_are_all_settings_and_launch_options():
    options = {field.name: field.default for field in dataclasses.fields(launch.LaunchOptions)}
    assert set(DECLARED) == {"project", "nproc", *SETTINGS, *options}
    assert {name: DECLARED[name].default for name in options} == options


def test_the_defaults_are_those_of_the_library_where_they_are_not_taken_from_the_project():
    taken = {name for name, parameter in DECLARED.items() if parameter.default in ("", 0) and SETTINGS.get(name)}
    assert taken == {"checkpoint", "data", "output", "seq_length"}
    assert [name for name in SETTINGS.keys() - taken if DECLARED[name].default != SETTINGS[name]] == []


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_of_the_kit_sets_what_a_training_can_run_with(name):
    given = open_project(name).parameters["05_train"]
    place = {"checkpoint": "c", "data": "d", "output": "o", "eval_data": "e"}
    values = {name: parameter.default for name, parameter in DECLARED.items()} | given | place
    settings = {name: values[name] for name in SETTINGS} | {"seq_length": 16_384}
    TrainConfig(**settings).data_parallel(values["nproc"] * values["slurm_nodes"])
    if name != "tiny":  # nothing that a model of another size learns by differs from the original's
        longer = {"global_batch_size"} if name.endswith("k") else set()  # with longer samples, fewer in a step
        assert {key for key in given if key in SETTINGS} <= FOR_MEMORY | longer
    assert (ROOT / "projects" / f"{name}.yaml").read_text().startswith("# ")


def test_the_tiny_project_has_the_settings_of_the_demo():
    tiny = open_project("tiny").parameters
    given = tiny["05_train"] | tiny["04_tokenize_and_inspect"]
    assert {name: given[name] for name in demo.TINY} == demo.TINY
    assert tiny["01_patch_tokenizer"]["model"] == demo.MODEL
    assert tiny["03_build_dataset"]["long"] == f"{demo.SOURCES}/long.jsonl"


@pytest.fixture
def run(tmp_path):
    """Parameters of a short run of two ranks that outlives its notebook."""
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "data")
    place = {"checkpoint": str(tmp_path / "megatron"), "data": str(tmp_path / "data"), "train_iters": 100_000}
    yield settings(output=str(tmp_path / "run"), **place).to_json() | {"nproc": 2, "on_interrupt": "leave"}
    for process in survivors(tmp_path):
        process.kill()


def papermill(folder: Path, notebook: Path, parameters: dict) -> subprocess.Popen:
    (folder / "run.yaml").write_text(json.dumps(parameters))
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(folder / "out.ipynb"),
        "--no-progress-bar",
        "--log-output",
    ]
    environment = os.environ | SECRETS | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    arguments = ["-f", str(folder / "run.yaml")] if parameters else []
    return subprocess.Popen([*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True)


def test_rerun_after_a_killed_kernel_it_reattaches_and_records_the_training(run, tmp_path):
    output = Path(run["output"])
    first = papermill(tmp_path, NOTEBOOK, run)
    wait_until(lambda: output.exists() and read_metrics(output), 300, "a step", output / "train.log")
    (kernel,) = psutil.Process(first.pid).children()
    kernel.kill()
    assert first.wait(timeout=300) != 0 and not (output / "status.json").exists()
    started = launch.attach(output)

    second = papermill(tmp_path, NOTEBOOK, run)
    lines = []
    while "already running, nothing was started" not in "".join(lines):
        lines.append(second.stderr.readline())
        assert lines[-1], lines
    launch.attach(output).stop()
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 1 and "\nnot done: stopped by you after step" in errors, errors
    shown = (tmp_path / "out.ipynb").read_text()
    assert f"process {started.pid}" in shown
    status = json.loads((output / "status.json").read_text())
    assert status["status"] == "stopped" and status["ended"] == "stopped by you"
    assert status["iteration"] == len(read_metrics(output)) < 100_000
    assert status["checkpoint"] == str(newest(output)) and status["checkpoint"] in shown
    assert all(fact in shown for fact in provenance.made_with().values())
    assert "image/png" in shown and "(given)" in shown
    for text in [shown, errors, *lines, *(path.read_text() for path in output.glob("*.*") if path.is_file())]:
        assert not any(secret in text for secret in SECRETS.values())


def test_a_stopped_run_has_its_own_exit_code_and_resumes_when_run_again(run, tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(run | {"time_limit": 0.05, "nproc": 1}))
    command = [sys.executable, "-m", "rsft_lib.notebook", NOTEBOOK, tmp_path, "-f", tmp_path / "run.yaml"]
    steps = [0]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 75, done.stderr
        status = json.loads((Path(run["output"]) / "status.json").read_text())
        assert status["status"] == "stopped" and status["ended"] == "stopped at the time limit"
        assert done.stderr.rstrip().endswith(f"not done: {status['hint']}"), done.stderr
        steps.append(status["iteration"])
    assert 0 < steps[1] < steps[2] == len(read_metrics(Path(run["output"])))
    log = (Path(run["output"]) / "train.log").read_text()
    assert log.count("=== run started") == log.count("stopped at the time limit after step") == 2


FAILING = """
import os
from rsft_lib import launch
from rsft_lib.launch import local
from rsft_lib.training.config import TrainConfig

local.TRAIN, os.environ["RANKS_SHALL"] = "rank", "fail-recorded"
launch.start_training(TrainConfig(checkpoint="/", data="/", output=FOLDER), 2).wait()
"""


def test_the_error_of_a_failed_rank_is_in_the_executed_notebook_and_in_papermills(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FAILING.replace("FOLDER", repr(str(tmp_path))))])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, tmp_path / "in.ipynb")
    process = papermill(tmp_path, tmp_path / "in.ipynb", {})
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    outputs = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs
    (shown,) = ("\n".join(output.traceback) for output in outputs if output.output_type == "error")
    assert shown.startswith("rank 1: Traceback") and "KeyError: 'broken on rank 1'" in shown
    assert "job.py" not in shown and shown in errors
