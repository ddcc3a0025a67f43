"""Trainings as batch jobs, on a real Slurm with two nodes on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cluster
import forked
import pytest
from processes import survivors, wait_until
from support import ROOT, TESTS, random_store, settings, tiny_model

from rsft_lib import launch
from rsft_lib.checkpoint.convert import convert
from rsft_lib.launch import slurm
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

TWO = {"launcher": "slurm", "slurm_nodes": 2}
NOTEBOOK = """
import sys, time
from rsft_lib import launch
from rsft_lib.launch import slurm
from rsft_lib.training.config import TrainConfig

slurm.TRAIN = "rank"
config = TrainConfig(checkpoint="/", data="/", output=sys.argv[1])
options = launch.LaunchOptions(launcher="slurm", slurm_nodes=2, on_interrupt=sys.argv[2])
launch.start_training(config, 1, options)
time.sleep(600)
"""
SECRET = "hf_" + "S" * 34


@pytest.fixture(scope="module")
def nodes():
    if why := cluster.missing():
        pytest.skip(why)
    with cluster.cluster():
        yield


@pytest.fixture
def pretended(nodes, monkeypatch):
    """Use the ranks of tests/rank.py, which do not train but save when asked to stop; query Slurm often."""
    monkeypatch.setattr(slurm, "TRAIN", "rank")
    monkeypatch.setattr(slurm, "ASK_EVERY", 0.3)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}:{ROOT}")


def config(folder: Path) -> TrainConfig:
    return TrainConfig(checkpoint="/", data="/", output=str(folder), train_iters=5, save_timeout=20)


def ranks_are_there(folder: Path) -> bool:
    return len(list(folder.glob("rank*.pid"))) == 2


def start(folder: Path, **changes) -> launch.Job:
    return launch.start_training(config(folder), 1, launch.LaunchOptions(**TWO, **changes))


def test_a_job_of_two_nodes_is_stopped_before_its_limit_requeued_and_ends_as_an_unbroken_run(nodes, tmp_path):
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "data")
    place = {
        "checkpoint": str(tmp_path / "megatron"),
        "data": str(tmp_path / "data"),
        "train_iters": 300,
        "micro_batch_size": 2,
    }
    forked.train(settings(output=str(tmp_path / "straight"), **place), 2)

    run = tmp_path / "run"
    given = settings(output=str(run), **place).to_json() | TWO | {"nproc": 1, "layout": "auto"}
    process = start_notebook(tmp_path, given)
    wait_until(lambda: run.exists() and len(read_metrics(run)) >= 3, 300, "three steps", run / "train.log")
    job = launch.attach(run).id
    cluster.output_of("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_until(lambda: "PENDING" in state(job), 300, "the job is back in the queue", run / "train.log")
    stopped = json.loads((run / "ended.json").read_text())
    assert stopped["reason"] == "SIGTERM" and stopped["iteration"] < 300
    cluster.output_of("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm waits for two minutes by itself
    assert process.wait(timeout=600) == 0

    assert f"resumed from {run}/iter_{stopped['iteration']:07d}" in (run / "train.log").read_text()
    losses, expected = ([r["loss"] for r in read_metrics(folder)] for folder in (run, tmp_path / "straight"))
    assert losses == expected
    status = json.loads((run / "status.json").read_text())
    assert status["ended"] == "finished" and status["checkpoint"] == str(run / "iter_0000300")
    shown = (tmp_path / "out.ipynb").read_text()
    assert "replicas, 2 packs at once is best" in shown and "2 = 2 data" in (run / "train.log").read_text()
    assert f"Slurm job {job}: running on n[0-1]" in shown and "image/png" in shown
    for written in [shown, *(path.read_text() for path in run.glob("*.*") if path.is_file())]:
        assert SECRET not in written


def start_notebook(folder: Path, parameters: dict) -> subprocess.Popen:
    (folder / "run.yaml").write_text(json.dumps(parameters))
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "05_train.ipynb"), str(folder / "out.ipynb")]
    environment = os.environ | {"HF_TOKEN": SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, "-f", str(folder / "run.yaml"), "--no-progress-bar"], env=environment)


def state(job: str) -> str:
    return cluster.output_of("squeue", "--noheader", "--jobs", job, "--format=%T")


def test_a_pending_job_shows_its_reason_and_is_removed_from_the_queue(pretended, tmp_path, capsys):
    job = start(tmp_path, slurm_options="--begin=now+1hour", slurm_time="00:10:00", slurm_partition="p")
    assert "pending (BeginTime)" in job.state and job.running
    polls = []

    def poll():
        polls.append(job.state)
        if len(polls) == 2:
            job.stop()

    with pytest.raises(launch.RunStopped, match="stopped by you before it had anything to save.*cancelled"):
        job.wait(poll)
    assert f"Slurm job {job.id}: pending (BeginTime)" in capsys.readouterr().out
    assert launch.attach(tmp_path) is None


def test_a_job_is_found_from_elsewhere_stopped_and_ends_with_what_it_saved(pretended, tmp_path):
    start(tmp_path, on_interrupt="leave")
    wait_until(lambda: ranks_are_there(tmp_path), 300, "both ranks start", tmp_path / "train.log")
    job = launch.attach(tmp_path)
    assert "running on n[0-1]" in job.state
    job.stop()
    job.wait()
    assert job.ended == {"reason": "SIGTERM", "iteration": 3}
    assert job.state == f"Slurm job {job.id}: stopped" and "stopped by you after step 3" in job.status()["hint"]
    assert job.facts["ExitCode"] == "75:0"  # for `sbatch --dependency=afterok` it is not done


@pytest.mark.parametrize("choice", ["stop", "leave"])
def test_a_job_follows_on_interrupt_when_its_notebook_is_killed(pretended, tmp_path, choice):
    arguments = [str(tmp_path / "run"), choice]
    notebook = subprocess.Popen([sys.executable, "-c", NOTEBOOK, *arguments])
    wait_until(lambda: ranks_are_there(tmp_path / "run"), 300, "both ranks start")
    notebook.send_signal(signal.SIGKILL)
    notebook.wait()
    if choice == "leave":
        with pytest.raises(AssertionError):
            wait_until(lambda: not launch.attach(tmp_path / "run"), 3, "the job ends, but it shall not")
        launch.attach(tmp_path / "run").stop()
    wait_until(lambda: not launch.attach(tmp_path / "run"), 300, "the job ends")
    assert '"SIGTERM"' in (tmp_path / "run" / "ended.json").read_text()
    wait_until(lambda: not survivors(tmp_path), 300, "all ranks end")


def test_a_failing_rank_is_an_error_with_its_traceback_first(pretended, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_SHALL", "fail-recorded")
    with pytest.raises(launch.RunFailed) as error:
        start(tmp_path).wait()
    assert str(error.value).startswith("rank 1: Traceback") and "KeyError: 'broken on rank 1'" in str(error.value)
    assert "failed" in str(error.value).splitlines()[-1] and str(tmp_path / "train.log") in str(error.value)


def test_a_node_that_fails_fails_a_job_that_may_not_be_queued_again(pretended, tmp_path):
    job = start(tmp_path, slurm_options="--no-requeue")
    wait_until(lambda: ranks_are_there(tmp_path), 300, "both ranks start", tmp_path / "train.log")
    cluster.output_of("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    try:
        with pytest.raises(launch.RunFailed, match="node_fail"):
            job.wait()
    finally:
        cluster.output_of("scontrol", "update", "NodeName=n1", "State=RESUME")
        wait_until(lambda: cluster.output_of("sinfo", "-h", "-o", "%t").strip() == "idle", 300, "the node is back")


def test_a_submission_rejected_by_slurm_is_an_error_with_its_reason(pretended, tmp_path):
    with pytest.raises(ValueError, match="Slurm rejects .*job.sbatch: .*[Ii]nvalid partition"):
        start(tmp_path, slurm_partition="none")
    assert launch.attach(tmp_path) is None


def test_a_run_folder_of_any_name_is_trained_in_and_logged_to(pretended, tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_SHALL", "finish")
    run = tmp_path / 'a run\'s 100 % "$HOME" `id` $(id) & #; JobState=COMPLETED %j 解'
    job = start(run)
    wait_until(lambda: not job.running, 120, "the job ends", run / "train.log")
    log = (run / "train.log").read_text()
    assert "rank 0 was here" in log and "rank 1 was here" in log
    assert [path.name for path in tmp_path.iterdir()] == [run.name]
    assert job.facts["JobName"] == re.sub(r"[^\w]", "_", run.name) and job.facts["JobState"] in slurm.OVER


@pytest.mark.parametrize("name", ["a\ntouch pwned\nb", "a\rb", "a\u2028b", "back\\slash", "tab\t", "\udcff"])
def test_a_run_folder_whose_name_would_break_out_of_its_line_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="output is .*; Slurm needs a path of printable characters"):
        slurm.batch_script(tmp_path / name / "run", 1, launch.LaunchOptions(**TWO))


@pytest.mark.parametrize("name", ["slurm_partition", "slurm_time", "slurm_options"])
def test_an_option_that_would_break_out_of_its_line_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be one line"):
        launch.LaunchOptions(**TWO, **{name: "x\ntouch pwned"})


def test_accounting_shows_whether_a_job_unknown_to_the_controller_was_stopped(tmp_path, monkeypatch):
    answers = {"scontrol": (1, "", "error: Invalid job id specified"), "sacct": (0, "FAILED|75:0\n", "")}
    monkeypatch.setattr(slurm, "_slurm", lambda *c: subprocess.CompletedProcess(c, *answers[c[0]]))
    (tmp_path / "ended.json").write_text('{"reason": "SIGTERM", "iteration": 3}')
    job = slurm.SlurmJob(tmp_path, "7", train_iters=5, on_interrupt="leave", patience=20)
    job.wait()
    assert job.state == "Slurm job 7: stopped"
    answers["sacct"] = (0, "CANCELLED by 0|0:0\n", "")
    job.queried = 0.0
    assert not job.running and job.state == "Slurm job 7: cancelled"


def test_without_slurm_the_error_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="launcher is 'slurm', but this machine has no sinfo: run on a login node"):
        start(tmp_path / "run")
    (tmp_path / "job.json").write_text(json.dumps({
        "launcher": "slurm", "id": "7", "train_iters": 5, "on_interrupt": "leave", "patience": 20,
    }))  # fmt: skip
    with pytest.raises(ValueError, match="belongs to Slurm job 7, and this machine has no Slurm"):
        launch.attach(tmp_path)


def test_the_script_is_readable_and_contains_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "_has_gpus", lambda options: True)
    run = tmp_path / "a run's 100 %"
    options = launch.LaunchOptions(**TWO, slurm_time="04:00:00", slurm_partition="gpu", slurm_options="--account lab")
    script = slurm.batch_script(run, 8, options)
    for line in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=04:00:00", "partition=gpu", "account lab"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --job-name=a_run_s_100__\n" in script
    assert "#SBATCH --requeue\n#SBATCH --signal=B:USR1@300\n" in script and "100 %%/train.log" in script
    assert "\nexport THP_MEM_ALLOC_ENABLE=${THP_MEM_ALLOC_ENABLE:-1}\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert max(map(len, script.replace(str(tmp_path), "").splitlines())) <= 120
