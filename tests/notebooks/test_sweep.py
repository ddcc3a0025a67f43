"""Notebook 09: a sweep is resumed, compared and refused as its project is; RSFT_LONG_TESTS=1 kills it 20 times."""

import json
import os
import re
import shutil
from pathlib import Path

import cluster
import killing_sweep
import pytest
import torch
from chain import outputs, pictures
from killing import differences
from killing_sweep import project
from real import LONG
from support import ROOT, trained

from rsft_lib.chain import sweep
from rsft_lib.chain.parameters import Parameter, declared_parameters
from rsft_lib.chain.project_file import ProjectError, notebook_file
from rsft_lib.chain.sweep import Trial, plan
from rsft_lib.chain.sweep_cost import cost_table
from rsft_lib.chain.sweep_queue import places_for
from rsft_lib.chain.sweep_results import outcomes, states_table
from rsft_lib.notebook import run
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

STEPS, LR, SEEDS = 4, [1e-3, 4e-3], [1, 2]
VARY = {"lr": LR, "seed": SEEDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for projects; every training has one thread, since their number changes the last bits of sums."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(ROOT)
        yield tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def swept(folder) -> tuple[Path, Path, dict]:
    """(project file, executed notebook, status) of a sweep of two learning rates and two seeds."""
    file = project(folder, "sums", VARY, STEPS)
    return file, *run(notebook_file("09_sweep"), folder / "executed", {"project": str(file)})


def trials_of(file: Path, vary: dict | list | str | None = None, last: str = "") -> list[Trial]:
    text = vary if isinstance(vary, str) else json.dumps(vary or VARY)
    return plan(str(file), text, file.with_suffix("") / "09_sweep" / "trials", last)


def held_out(trial: Trial) -> float:
    return read_metrics(trial.project.folder / "05_train")[-1]["eval_loss"]


def test_the_table_has_the_mean_of_each_setting_and_students_interval(swept):
    file, executed, status = swept
    assert status["status"] == "done"
    losses = {(trial.values["lr"], trial.values["seed"]): held_out(trial) for trial in trials_of(file)}
    assert {(one["lr"], one["seed"]): one["held_out_loss"] for one in status["results"]} == losses
    shown = "".join(output["data"].get("text/plain", "") for output in outputs(executed) if "data" in output)
    for lr in LR:
        one, other = (losses[lr, seed] for seed in SEEDS)
        middle, margin = (one + other) / 2, 12.706 * abs(one - other) / 2  # t of one degree of freedom, s / sqrt(2)
        row = rf"{lr:g} +2 +{middle:#.4g} +{middle - margin:#.4g} to {middle + margin:#.4g}"
        assert re.search(row, shown), (row, shown)
    assert pictures(executed) == 1


def test_a_trial_is_the_training_with_its_values(swept, folder):
    trial = trials_of(swept[0])[3]
    parameters = trial.project.parameters["05_train"]
    assert trial.values == {"lr": 4e-3, "seed": 2}
    config = {name: value for name, value in parameters.items() if name != "nproc"} | {"lr": 4e-3, "seed": 2}
    trained(TrainConfig(**config, output=str(folder / "alone")), 1)
    assert differences(trial.project.folder / "05_train", folder / "alone") == []


def test_a_second_time_nothing_runs_and_more_seeds_are_all_that_is_missing(swept, folder):
    file, before = swept[0], killing_sweep.finished(swept[0])
    executed, status = run(notebook_file("09_sweep"), folder / "again", {"project": str(file)})
    assert "4 of 4 trials were done before" in str(outputs(executed))
    assert killing_sweep.finished(file) == before and len(before) == 4
    assert status["results"] == swept[2]["results"]
    more = trials_of(file, {"lr": LR, "seed": [*SEEDS, 3]})
    assert [trial.values["seed"] for trial in more if trial.first_not_done()] == [3, 3]


def test_trials_that_differ_in_more_than_what_is_varied_are_not_compared(swept):
    file = swept[0]
    trials, written = trials_of(file), file.read_text()
    assert len(outcomes(trials, "held_out_loss")) == 4
    record = trials[1].project.folder / "05_train" / "status.json"
    kept = record.read_text()
    changed = json.loads(kept)
    changed["given"].append("weight_decay")
    changed["parameters"]["weight_decay"] = 0.5
    record.write_text(json.dumps(changed))
    with pytest.raises(
        ValueError, match="more than what is varied:\n  lr=0.001_seed=2: 05_train ran with weight_decay 0.5"
    ):
        outcomes(trials, "held_out_loss")
    record.write_text(kept)
    project(file.parent, "sums", VARY, STEPS, clip_grad=0.5)
    with pytest.raises(ValueError) as error:
        outcomes(trials_of(file), "held_out_loss")
    assert str(error.value).count("05_train ran with clip_grad 1.0, which is now 0.5: run notebook 05_train again") == 4
    file.write_text(written)
    assert len(outcomes(trials_of(file), "held_out_loss")) == 4


def test_the_cost_is_that_of_a_training_that_was_run_scaled_to_the_steps(swept):
    file = swept[0]
    longer = {"train_iters": [STEPS, 2 * STEPS], "seed": [5]}
    assert "unknown: no training of this project" in repr(cost_table(str(file), trials_of(file, longer), [{}]))
    own = file.with_suffix("") / "05_train"  # the project's own run, by hand
    shutil.copytree(trials_of(file)[0].project.folder / "05_train", own)
    record = json.loads((own / "status.json").read_text())
    record["parameters"]["output"], record["given"] = str(own), ["project", "lr", "seed"]
    (own / "status.json").write_text(json.dumps(record))
    steps = [json.loads(line) | {"seconds": 30.0} for line in (own / "metrics.jsonl").read_text().splitlines()]
    (own / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    shown = dict(cost_table(str(file), trials_of(file, longer), [{}, {}]).rows)
    assert shown["trials"] == "2, of which 0 are done" and shown["at a time"].startswith("2")
    assert shown["training, each"].startswith("2 min 00 s to 4 min 00 s, as the run in") and str(own) in str(shown)
    assert shown["training, together"].startswith("about 4 min 00 s")
    epochs = cost_table(str(file), trials_of(file, {"epochs": [1.0, 2.0]}), [{}])
    assert "either the trials or" in repr(epochs)


def test_a_trial_that_fails_ends_no_other_and_is_named(folder):
    file = project(folder, "faulty", [{"clip_grad": -1.0}, {"clip_grad": 0.5}], STEPS)
    _, status = run(notebook_file("09_sweep"), folder / "faulty", {"project": str(file), "workers": 1})
    assert status["status"] == "stopped" and status["hint"] == "1 not done (clip_grad=-1.0): run again to resume"
    trials = trials_of(file, [{"clip_grad": -1.0}, {"clip_grad": 0.5}])
    assert [bool(trial.first_not_done()) for trial in trials] == [True, False]
    shown = str(outputs(folder / "faulty" / "09_sweep.ipynb"))
    assert "clip_grad=-1.0: error: cell" in shown and "clip_grad is -1.0" in shown and "clip_grad=0.5: done" in shown


def test_a_sweep_over_generation_takes_the_training_of_the_project(folder):
    file = project(folder, "untrained", {"07.temperature": [0.0, 1.0]})
    with pytest.raises(ProjectError, match="python -m rsft_lib.project run .*untrained.yaml --to 05"):
        trials_of(file, {"07.temperature": [0.0, 1.0]})


def test_values_saved_in_the_parameters_cell_of_a_notebook_are_refused(folder, monkeypatch):
    committed = declared_parameters(notebook_file("05_train")) | {"lr": Parameter("float", 0.5)}
    monkeypatch.setattr(sweep, "committed_parameters", lambda notebook: committed)
    with pytest.raises(ProjectError, match="05_train has values of lr saved in its parameters cell"):
        trials_of(project(folder, "typed"))


def test_gpus_are_shared_out_and_never_given_twice(folder, monkeypatch):
    trials = trials_of(project(folder, "gpus", nproc=2), {"lr": [1e-3, 2e-3, 3e-3, 4e-3]})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,6")
    found = [place["CUDA_VISIBLE_DEVICES"] for place in places_for(trials)]
    assert found == ["0,1", "2,3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places_for(trials)] == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="workers is 3, but 5 GPUs have room for 2, each with nproc=2"):
        places_for(trials, 3)
    slurm = trials_of(project(folder, "jobs", launcher="slurm"), {"lr": [1e-3, 2e-3, 3e-3]})
    assert places_for(slurm) == [{}, {}, {}], "Slurm places them"


@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing())
def test_with_slurm_all_trainings_are_queued_as_batch_jobs(folder):
    vary = {"lr": [1e-3], "seed": SEEDS}
    file = project(folder, "batch", vary, STEPS, launcher="slurm")
    with cluster.cluster():
        _, status = run(notebook_file("09_sweep"), folder / "batch", {"project": str(file)})
    assert status["status"] == "done" and len(status["results"]) == 2
    jobs = [json.loads((run_folder / "job.json").read_text()) for run_folder in killing_sweep.runs(file).values()]
    assert {job["launcher"] for job in jobs} == {"slurm"} and len({job["id"] for job in jobs}) == 2


def test_a_killed_sweep_goes_on_and_ends_like_an_undisturbed_one(tmp_path):
    vary = killing_sweep.VARY if LONG else {"lr": [1e-3, 2e-3], "seed": [1]}
    killing_sweep.survive(tmp_path, 20 if LONG else 2, vary, seed=int.from_bytes(os.urandom(4)))


def test_trials_of_several_environments_are_named_as_such(swept):
    trials = trials_of(swept[0])
    assert states_table(trials, {}).note == ""
    record = trials[0].project.folder / "05_train" / "status.json"
    kept = record.read_text()
    changed = json.loads(kept)
    changed["made_with"]["torch"] = "1.0"
    record.write_text(json.dumps(changed))
    assert re.search("not all made with the same torch: 1.0 and 2", states_table(trials, {}).note)
    record.write_text(kept)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("", "vary is ''; expected something like {lr: "), ("{lr: [1", "vary is not YAML"),
        ("[1, 2]", "expected something like"), ("{lrr: [1]}", "vary has 'lrr'; expected a parameter"),
        ("{output: [a]}", "vary has 'output'"), ("{11.lr: [1]}", "there is no notebook '11'"),
        ("{lr: [fast]}", "vary, 05_train: parameter lr is 'fast' .str., expected float"),
        ("{lr: [1e-3, 0.001]}", "vary has lr=0.001 more than once"), ("{06.lr: [1]}", "vary has '06.lr'"),
        ("{lr: [], seed: [1]}", "expected something like"), ("{overwrite: [true]}", "overwrite is a parameter of 01"),
    ],
)  # fmt: skip
def test_what_cannot_be_varied_is_refused_with_what_was_expected(folder, vary, message):
    file = project(folder, "refused")
    with pytest.raises(ValueError, match=message):
        trials_of(file, vary)
    assert not file.with_suffix("").exists()
