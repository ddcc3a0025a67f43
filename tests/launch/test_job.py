"""Trainings as jobs under real torchrun: attach, start, stop, fail."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import psutil
import pytest
from processes import survivors, wait_until
from support import TESTS

from rsft_lib import launch
from rsft_lib.launch import local
from rsft_lib.launch.job import JOB, Job
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.run_folder import STOPPING

LEAVE = launch.LaunchOptions(on_interrupt="leave")


@pytest.fixture(autouse=True)
def pretended_training(monkeypatch):
    monkeypatch.setattr(local, "TRAIN", "rank")
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


def config(folder: Path, **changes) -> TrainConfig:
    return TrainConfig(checkpoint="/", data="/", output=str(folder), train_iters=5, save_timeout=20, **changes)


def ranks_are_there(folder: Path) -> bool:
    return len(list(folder.glob("rank*.pid"))) == 2


@pytest.fixture
def left(tmp_path):
    """A running job of two ranks with on_interrupt="leave"."""
    job = launch.start_training(config(tmp_path), 2, LEAVE)
    wait_until(lambda: ranks_are_there(tmp_path), 300, "both ranks start", tmp_path / "train.log")
    yield job
    job.kill()
    assert not survivors(tmp_path)


def test_a_job_is_found_by_its_folder_stopped_once_and_ends_with_what_it_saved(left, capfd):
    found = launch.attach(left.folder)
    assert found.process is None and found.running and found.pid == left.pid
    assert (found.train_iters, found.on_interrupt, found.patience) == (5, "leave", 20)
    found.stop()
    left.stop()  # a second signal would end the ranks of these tests
    found.wait()
    assert found.ended == {"reason": "SIGTERM", "iteration": 3}
    left.wait()
    assert left.state == "ended" and launch.attach(left.folder) is None
    hint = "stopped by you after step 3 of 5; run again with the same settings to resume"
    assert left.status() == {"status": "stopped", "hint": hint}


def test_a_second_start_finds_the_first_and_refuses_other_settings(left, capsys):
    assert launch.start_training(config(left.folder), 2, LEAVE).pid == left.pid
    assert "already running, nothing was started" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings runs in .*\n  lr: running with 1e-05, requested 2e-05\n"):
        launch.start_training(config(left.folder, lr=2e-5), 2, LEAVE)
    assert len([p for p in survivors(left.folder) if "torch.distributed.run" in p.cmdline()]) == 1


def test_a_job_of_an_older_version_without_a_setting_is_attached_to(left):
    path = left.folder / "config.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in recorded.items() if name != "lr_schedule"}))
    assert launch.start_training(config(left.folder), 2, LEAVE).pid == left.pid
    with pytest.raises(ValueError, match="lr_schedule: running with 'cosine', requested 'linear'"):
        launch.start_training(config(left.folder, lr_schedule="linear"), 2, LEAVE)


@pytest.mark.parametrize("name", ["checkpoint", "data", "eval_data"])
def test_a_missing_input_is_named_and_nothing_is_started(tmp_path, name):
    wrong = dataclasses.replace(config(tmp_path / "run"), **{name: str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match=f"{name}: {tmp_path}/nowhere does not exist: run notebook"):
        launch.start_training(wrong, 1, LEAVE)
    assert not [*(tmp_path / "run").iterdir()]


def test_a_process_with_a_reused_pid_is_not_the_job(left):
    facts = json.loads((left.folder / JOB).read_text())
    (left.folder / JOB).write_text(json.dumps(facts | {"pid": os.getpid()}))
    assert launch.attach(left.folder) is None
    (left.folder / JOB).write_text(json.dumps(facts | {"birth": "another boot " + facts["birth"].split()[1]}))
    assert launch.attach(left.folder) is None
    (left.folder / JOB).write_text(json.dumps(facts))
    assert launch.attach(left.folder).pid == left.pid


def test_an_interrupt_leaves_the_job_running_with_on_interrupt_leave(left, capsys):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        left.wait(interrupt)
    assert left.running and "training continues" in capsys.readouterr().out


def test_an_interrupt_stops_the_job_with_on_interrupt_stop(tmp_path):
    def interrupt():
        if ranks_are_there(tmp_path):
            raise KeyboardInterrupt

    job = launch.start_training(config(tmp_path), 2)
    with pytest.raises(KeyboardInterrupt):
        job.wait(interrupt)
    assert not job.running and job.ended["reason"] == "SIGTERM" and not survivors(tmp_path)


def test_a_killed_rank_fails_the_job_with_the_reason_first(tmp_path):
    job = launch.start_training(config(tmp_path), 2)
    wait_until(lambda: ranks_are_there(tmp_path), 300, "both ranks start", tmp_path / "train.log")
    psutil.Process(int((tmp_path / "rank1.pid").read_text())).kill()
    (tmp_path / "rank0.pid").unlink()
    with pytest.raises(launch.RunFailed) as error:
        job.wait()
    assert str(error.value).startswith("rank 1: Signal 9 (SIGKILL)") and "out of memory?" in str(error.value)
    assert error.value._render_traceback_() == [str(error.value)]


@pytest.mark.parametrize("seconds", [0, 1, 3])
def test_a_job_may_be_stopped_at_once(tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("RANKS_SHALL", "sleep")
    job = launch.start_training(config(tmp_path), 2)
    time.sleep(seconds)  # torchrun has ranks by then, or has none yet
    job.stop()
    with pytest.raises(launch.RunStopped):
        job.wait()
    assert not survivors(tmp_path)


@pytest.mark.parametrize(("ranks", "kind"), [("sleep", launch.RunStopped), ("fail-recorded", launch.RunFailed)])
def test_stopping_a_job_before_its_first_step_is_not_a_failure_unless_a_rank_fails(tmp_path, monkeypatch, ranks, kind):
    monkeypatch.setenv("RANKS_SHALL", ranks)
    job = launch.start_training(config(tmp_path), 2)
    if ranks == "sleep":
        wait_until(lambda: ranks_are_there(tmp_path), 300, "both ranks start", tmp_path / "train.log")
        job.stop()
    else:
        (tmp_path / STOPPING).touch()  # the rank that fails may end the other before that has started
    with pytest.raises(launch.RunFailed) as error:
        job.wait()
    assert type(error.value) is kind
    begin = "stopped by you before it had anything to save" if ranks == "sleep" else "rank 1: Traceback"
    assert str(error.value).startswith(begin), str(error.value)


def test_two_simultaneous_starts_start_one_job(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_start, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    job, torchruns = launch.attach(tmp_path), [p for p in survivors(tmp_path) if "torch.distributed.run" in p.cmdline()]
    for process in torchruns:
        process.terminate()
    wait_until(lambda: not survivors(tmp_path), 300, "all end")
    assert [process.exitcode for process in both] == [0, 0]
    assert [process.pid for process in torchruns] == [job.pid]


def _start(folder: Path) -> None:
    def start_slowly(*arguments, **options):
        time.sleep(2)  # the other one is running by now
        return start(*arguments, **options)

    start, local.start_torchrun, local.TRAIN = local.start_torchrun, start_slowly, "rank"
    launch.start_training(config(folder), 2, LEAVE)


def test_a_job_of_another_machine_that_still_writes_is_not_joined_by_a_second(tmp_path):
    (tmp_path / JOB).write_text(
        json.dumps({"launcher": "local", "host": "elsewhere", "pid": 1, "birth": "x", **COMMON}), encoding="utf-8"
    )
    (tmp_path / "train.log").write_text("step 1")
    with pytest.raises(ValueError, match="was started on elsewhere and last wrote"):
        launch.start_training(config(tmp_path), 2)
    assert launch.attach(tmp_path) is None


COMMON = {"train_iters": 5, "on_interrupt": "leave", "patience": 20}


def test_the_end_of_the_log_lacks_torchruns_report_of_ranks_that_were_stopped(tmp_path):
    """Ranks that are asked to stop while they import end by the signal, which torchrun reports as a failure."""
    stub = "import signal, os; print('importing', flush=True); os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "stub.py").write_text(stub)
    job = Job(tmp_path, **COMMON)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(tmp_path / "stub.py")]
    with job.log.open("wb") as file:
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    assert "ChildFailedError" in job.log.read_text()
    assert job.tail().rstrip() == "importing"


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    job = Job(tmp_path, **COMMON)
    assert job.tail() == ""
    with job.log.open("wb") as file:
        file.seek(100 * 2**20)
        file.write("\n".join(f"zeile {i} 解" for i in range(1000)).encode())
    tracemalloc.start()
    assert job.tail(3) == "zeile 997 解\nzeile 998 解\nzeile 999 解"
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"launcher": "mpi"}, "launcher is 'mpi'; choose 'local', 'slurm'"),
        ({"on_interrupt": "ask"}, "on_interrupt is 'ask'; choose 'stop', 'leave'"),
        ({"slurm_nodes": 2}, "slurm_nodes is 2, but launcher is 'local'"),
        ({"slurm_nodes": 0, "launcher": "slurm"}, "slurm_nodes is 0"),
        ({"slurm_options": "--mem 1\nrm -r x"}, "slurm_options is .*; it must be one line"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        launch.LaunchOptions(**changes)
