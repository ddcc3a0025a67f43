"""Run folders with files damaged by a power loss or a full disk, or added by a user."""

import dataclasses
import errno
import fcntl
import json
import shutil
from pathlib import Path

import forked
import pytest
from standin import ended_job, record
from support import TESTS, random_store, settings, tiny_model

from rsft_lib import launch
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints
from rsft_lib.common import locks
from rsft_lib.common.artifact import publish, write_manifest
from rsft_lib.display.live.live import LiveRun
from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.runs.curves import plot_curves
from rsft_lib.display.runs.runs import open_run, runs_table
from rsft_lib.launch import failure, local, training
from rsft_lib.launch.job import Job
from rsft_lib.training.metrics import DAMAGED, FILE, MetricsWriter, read_metrics, scan_metrics
from rsft_lib.training.retention import remove_leftovers, remove_old, set_aside
from rsft_lib.training.run_folder import how_it_ended, read_ended
from rsft_lib.training.same_run import refuse_another_run

COMMON = {"train_iters": 10, "on_interrupt": "leave", "patience": 20}
CUT = b'{"iteration": 4, "lo'
WRONG = {
    "cut in the middle": CUT,
    "zero bytes": b"\0" * 300,
    "zero bytes within": b'{"iteration": 4, "loss"\0\0\0\0: 1.0}',
    "cut, and the next line in the same": CUT + json.dumps(record(5, 10)).encode(),
    "zero bytes, and the next line in the same": b"\0" * 300 + json.dumps(record(5, 10)).encode(),
    "not UTF-8": b'{"iteration": 4, "note": "\xff"}',
    "no step": b'{"loss": 1.0}',
    "a step that is none": b'{"iteration": "4"}',
    "no loss": b'{"iteration": 4}',
    "a loss that is null": b'{"iteration": 4, "loss": null}',
    "a loss that is a text": b'{"iteration": 4, "loss": "x"}',
    "a loss that no float can hold": b'{"iteration": 4, "loss": 1' + b"0" * 400 + b"}",
    "a step that no float can hold": b'{"iteration": 1' + b"0" * 400 + b', "loss": 1.0}',
    "another metric that is a text": b'{"iteration": 4, "loss": 1.0, "eval_loss": "x"}',
    "brackets without end": b"[" * 100_000,
    "no object": b"4",
    "nothing": b"",
}


class Ended(Job):
    state = "ended"


def lines(steps) -> list[bytes]:
    return [json.dumps(record(step, 10)).encode() for step in steps]


def write(folder: Path, *content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(b"".join(line + b"\n" for line in content))
    return folder


@pytest.mark.parametrize("wrong", WRONG)
def test_a_damaged_line_is_skipped_and_reported_by_every_reader(tmp_path, wrong):
    run = write(tmp_path / "run", *lines(range(1, 4)), WRONG[wrong], *lines(range(6 if "next" in wrong else 5, 11)))
    assert [r["iteration"] for r in read_metrics(run)] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    damaged, missing = scan_metrics(run).problems
    assert damaged.startswith("metrics.jsonl: line 4 is damaged") and missing == "metrics.jsonl: step 4 is missing"

    follower = Follower(run)
    assert follower.read() and follower.last["iteration"] == 10
    assert follower.problem.startswith("metrics.jsonl: line 4 damaged")
    live = LiveRun(ended_job(run, 10))
    live.poll()
    assert all("line 4 damaged" in shown for shown in live._card().values())

    plot_curves(run)
    assert damaged in repr(runs_table([open_run(run, "mine")])) and missing in repr(runs_table([open_run(run, "mine")]))
    outcome = Ended(run, **COMMON).outcome()
    assert outcome["damaged"] == f"{damaged}; {missing}" and damaged in outcome["summary"]


def test_missing_steps_are_reported_on_resume_and_the_damaged_file_is_kept(tmp_path, capsys):
    run = write(tmp_path / "run", *lines(range(1, 3)), CUT, *lines(range(6, 8)), b"\0" * 40)
    before = (run / FILE).read_bytes()
    MetricsWriter(run, 9).close()
    printed = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{run / FILE}: ").partition(" (")[0] for line in printed] == [
        "line 3 is damaged", "line 6 is damaged", "steps 3 to 5 are missing", "steps 8 to 9 are missing",
    ]  # fmt: skip
    assert (run / DAMAGED).read_bytes() == before
    assert [r["iteration"] for r in read_metrics(run)] == [1, 2, 6, 7]
    assert scan_metrics(run).problems == ["metrics.jsonl: steps 3 to 5 are missing"]  # also from now on


def test_a_process_killed_while_it_mends_the_metrics_loses_none_and_each_damaged_file_is_kept(tmp_path, monkeypatch):
    run = write(tmp_path / "run", *lines(range(1, 3)), CUT)
    before, replace = (run / FILE).read_bytes(), Path.replace

    def killed(path, target):
        if target == run / FILE:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        MetricsWriter(run, 9)
    assert (run / FILE).read_bytes() == before == (run / DAMAGED).read_bytes()
    MetricsWriter(run, 9).close()
    with (run / FILE).open("ab") as file:
        file.write(CUT + b"\n")
    again = (run / FILE).read_bytes()
    MetricsWriter(run, 9).close()
    kept = {path.name: path.read_bytes() for path in run.iterdir()}
    assert kept.pop(FILE) == b"".join(line + b"\n" for line in lines(range(1, 3)))
    assert kept == {DAMAGED: before, "metrics.damaged-2.jsonl": before, "metrics.damaged-3.jsonl": again}


def test_complete_metrics_have_no_problems(tmp_path, capsys):
    run = write(tmp_path / "run", *lines(range(1, 11)))
    with (run / FILE).open("ab") as file:
        file.write(b'{"iteration": 11, "lo')  # is being written
    assert scan_metrics(run).problems == [] == open_run(run, "mine").problems
    assert "damaged" not in Ended(run, **COMMON).outcome()
    MetricsWriter(run, 8).close()
    assert capsys.readouterr().out == "" and len(read_metrics(run)) == 8 and not (run / DAMAGED).exists()


def test_a_run_with_damaged_metrics_resumes(tmp_path):
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "data")
    place = {"checkpoint": str(tmp_path / "megatron"), "data": str(tmp_path / "data"), "output": str(tmp_path / "run")}
    config = settings(**place, train_iters=6, save_interval=3, lr=1e-4)
    forked.train(config)
    run, whole = tmp_path / "run", read_metrics(tmp_path / "run")
    shutil.rmtree(run / "iter_0000006")  # as if it had been killed after the middle
    (run / "ended.json").write_text('{"reason": "fini')
    written = (run / FILE).read_bytes().splitlines(keepends=True)
    (run / FILE).write_bytes(b"".join([written[0], b"\0" * len(written[1]), *written[2:]]))
    forked.train(config)
    log = (run / "train.log").read_text()
    assert f"{run / FILE}: line 2 is damaged" in log and f"{run / FILE}: step 2 is missing" in log
    assert [r["loss"] for r in read_metrics(run)] == [r["loss"] for r in whole if r["iteration"] != 2]
    assert read_ended(run) == {"reason": "finished", "iteration": 6}


def test_a_finished_run_is_recognized_after_its_base_was_removed(tmp_path, capsys):
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "data")
    place = {"checkpoint": str(tmp_path / "megatron"), "data": str(tmp_path / "data"), "output": str(tmp_path / "run")}
    config = settings(**place, train_iters=2, save_interval=2)
    forked.train(config)
    (tmp_path / "megatron").rename(tmp_path / "moved")
    launch.start_training(config, 1)
    assert "already finished, nothing was started" in capsys.readouterr().out
    launch.start_training(dataclasses.replace(config, checkpoint=str(tmp_path / "moved")), 1)
    assert "already finished, nothing was started" in capsys.readouterr().out
    for asked in ({"train_iters": 3}, {"checkpoint": str(tmp_path / "another")}):
        with pytest.raises(FileNotFoundError, match="checkpoint: .* does not exist"):
            launch.start_training(dataclasses.replace(config, **asked), 1)
    with pytest.raises(ValueError, match="belongs to another run:\n  lr: "):
        launch.start_training(dataclasses.replace(config, lr=1.0), 1)


@pytest.mark.parametrize("text", ["", "{", "\0" * 20, '{"iteration": 3}', '{"reason": "finished"}', "[]", "[" * 100_000,
                                  '{"reason": ["finished"], "iteration": 3}'])  # fmt: skip
def test_how_a_run_ended_is_unknown_where_its_file_is_damaged(tmp_path, text):
    run = write(tmp_path / "run", *lines(range(1, 11)))
    (run / "ended.json").write_text(text)
    assert how_it_ended(run).startswith("unknown") and "ended.json" in how_it_ended(run)
    assert "unknown" in repr(runs_table([open_run(run, "mine")]))
    assert Job(run, **COMMON).status()["status"] == "stopped"  # run again, it ends at once
    assert not training._finished(settings(checkpoint="/", data="/", output=str(run)), run)


@pytest.mark.parametrize(
    ("reason", "asked", "words"),
    [
        ("finished", True, "finished"), ("alarm", False, "stopped by an alarm"), ("SIGINT", False, "stopped by you"),
        ("SIGTERM", True, "stopped by you"), ("SIGTERM", False, "terminated (by scheduler"),
        ("time limit", False, "stopped at the time limit"),
    ],
)  # fmt: skip
def test_how_a_run_ended_is_described(tmp_path, reason, asked, words):
    run = write(tmp_path / "run", *lines(range(1, 11)))
    (run / "ended.json").write_text(json.dumps({"reason": reason, "iteration": 10}))
    if asked:
        (run / ".stopping").touch()
    assert how_it_ended(run).startswith(words) and words in repr(runs_table([open_run(run, "mine")]))
    live = LiveRun(ended_job(run, 10))
    live.end()
    assert live.state.startswith(words) and ("saved; run again to resume" in live.state) == (reason != "finished")
    assert Ended(run, **COMMON).outcome()["status"] == ("done" if reason == "finished" else "stopped")


@pytest.mark.parametrize("config", ['{"train_iters": "x"}', "[" * 100_000, '{"train_iters": null}'])
def test_runs_are_compared_though_little_is_known_of_one(tmp_path, config, capsys):
    run = write(tmp_path / "run", b'{"iteration": 1, "loss": 2.0}', b'{"iteration": 2, "loss": 1.0, "seconds": null}')
    (run / "config.json").write_text(config)
    found = open_run(run, "mine")
    assert "2 of –" in repr(runs_table([found])) and "1.000" in repr(runs_table([found]))
    for by in ("step", "token", "time", "share"):
        found.line("loss", by)
    assert Ended(run, **COMMON).outcome()["last_loss"] == 1.0


@pytest.mark.parametrize("wrong", [{"config": None}, {"data": None}, {"config": {}}, {"base_sha256": 5}])
def test_a_checkpoint_without_facts_of_its_run_is_damaged(tmp_path, wrong):
    config, data = settings(checkpoint="a", data="b", output="c").to_json(), {"packs": 5}
    facts = {"config": config, "data": data, "base_sha256": "abc"}
    write_manifest(tmp_path, {"made_by": "train", "iteration": 5} | facts)
    assert refuse_another_run(tmp_path, facts) == []
    write_manifest(tmp_path, {"made_by": "train", "iteration": 5} | facts | wrong)
    with pytest.raises(ValueError, match=f"{tmp_path}/manifest.json is damaged: the settings or data .* Move this"):
        refuse_another_run(tmp_path, facts)


def test_a_setting_that_an_older_version_did_not_have_is_compared_with_its_default(tmp_path):
    config, data = settings(checkpoint="a", data="b", output="c").to_json(), {"packs": 5}
    old = {name: value for name, value in config.items() if name not in ("lr_schedule", "tensorboard")}
    write_manifest(tmp_path, {"made_by": "train", "iteration": 5, "config": old, "data": data, "base_sha256": "abc"})
    facts = {"data": data, "base_sha256": "abc"}
    assert refuse_another_run(tmp_path, facts | {"config": config}) == []
    with pytest.raises(ValueError, match="another run:\n  lr_schedule: was 'cosine', now 'constant'\n"):
        refuse_another_run(tmp_path, facts | {"config": config | {"lr_schedule": "constant"}})
    log = refuse_another_run(tmp_path, facts | {"config": config | {"tensorboard": True}})
    assert log == ["tensorboard: was False, now True"]


def test_runs_are_compared_though_the_settings_of_one_are_damaged(tmp_path):
    run = write(tmp_path / "run", *lines(range(1, 11)))
    (run / "config.json").write_text('{"lr": 1')
    table = repr(runs_table([open_run(run, "mine")]))
    assert "10 of –" in table and f"{run / 'config.json'} is damaged" in table


JOB = {"launcher": "local", "pid": 1, "birth": "x", "host": "elsewhere", **COMMON}


@pytest.mark.parametrize(
    "text",
    [
        "{", "\0" * 20, "[]", "[" * 100_000, '{"launcher": "local", "pid": 1}', '{"launcher": "other"}',
        '{"launcher": "local", "pid": 1, "birth": "x", "host": "here"}', '{"launcher": "slurm", "id": "7"}',
        *(json.dumps(JOB | wrong) for wrong in ({"host": None}, {"pid": "x"}, {"patience": "x"}, {"launcher": ["x"]})),
    ],
)  # fmt: skip
def test_nothing_is_started_if_job_json_is_damaged(tmp_path, text):
    (tmp_path / "job.json").write_text(text)
    config = settings(checkpoint="/", data="/", output=str(tmp_path))
    with pytest.raises(ValueError, match=r"job.json is damaged: .* check with ps or squeue that none does, remove"):
        launch.start_training(config, 1)


def test_a_log_keeps_all_output_and_a_cause_is_searched_in_the_last_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
    log = tmp_path / "train.log"
    with pytest.raises(launch.RunFailed, match="broken on rank 1"):
        launch.launch("rank", [str(tmp_path), "fail-recorded"], 2, log)
    assert failure.torchrun_reports(log)
    launch.launch("rank", [str(tmp_path), "finish"], 1, log)
    assert not failure.torchrun_reports(log)
    text = log.read_text()
    assert text.count("=== run started 20") == 2 and "broken on rank 1" in text
    shown = Job(tmp_path, **COMMON).tail(50)
    assert "rank 0 was here" in shown and "===" not in shown and "broken on rank 1" not in shown
    log.write_text(text + "killed in the middle of a line")
    with pytest.raises(launch.RunFailed) as error:
        launch.launch("no_such_module", [], 1, log)
    assert "No module named no_such_module" in str(error.value) and "was here" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_does_not_keep_a_training_from_starting(tmp_path, monkeypatch, capsys, number):
    def refuse(*_):
        raise OSError(number, "no locks")

    locks.REPORTED.clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(local, "start", lambda folder, nproc, **common: "started")
    config = settings(checkpoint="/", data="/", output=str(tmp_path / "run"))
    assert launch.start_training(config, 1) == "started"
    assert f"no locks in {tmp_path / 'run'} (no locks): do not start" in capsys.readouterr().out


def saved(run: Path, *steps: int) -> Path:
    for step in steps:
        folder = checkpoint_folder(run, step)
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w")
        write_manifest(folder, {"made_by": "train", "iteration": step})
    return run


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_checkpoint_that_was_moved_and_is_linked_to_stays_and_the_run_goes_on(tmp_path, capsys):
    run, elsewhere = saved(tmp_path / "run", 5, 10, 15), tmp_path / "bigger disk"
    shutil.move(checkpoint_folder(run, 5), elsewhere)
    checkpoint_folder(run, 5).symlink_to(elsewhere)
    for _ in range(2):
        remove_old(run, 15, keep_last=1, keep_every=0)
    assert names(run) == ["iter_0000005", "iter_0000015"] and (elsewhere / "weights").exists()
    assert capsys.readouterr().out == f"not removed: {run / 'iter_0000005'}, since it is a link\n"

    (run / "iter_0000005").rename(run / ".iter_0000005.old")  # as it was left before
    remove_leftovers(run)
    assert names(run) == [".iter_0000005.old.set-aside-1", "iter_0000015"] and (elsewhere / "weights").exists()


def test_a_checkpoint_into_which_somebody_put_files_stays(tmp_path, capsys):
    run = saved(tmp_path / "run", 5, 10)
    (run / "iter_0000005" / "my_results.json").touch()
    for _ in range(2):
        remove_old(run, 10, keep_last=1, keep_every=0)
    assert names(run) == ["iter_0000005", "iter_0000010"]
    assert capsys.readouterr().out.count("iter_0000005, since this kit did not write my_results.json in it") == 1


def test_a_checkpoint_with_files_of_somebody_is_set_aside_where_its_step_is_saved_again(tmp_path, capsys):
    run = saved(tmp_path / "run", 5)
    (run / "iter_0000005" / "my_results.json").touch()
    (run / "new").mkdir()
    set_aside(run / "iter_0000005")
    publish(run / "new", run / "iter_0000005", {"made_by": "train", "iteration": 5})
    assert (run / "iter_0000005.set-aside-1" / "my_results.json").exists() and "renamed to" in capsys.readouterr().out
    assert checkpoints(run) == [run / "iter_0000005"]


def test_files_with_the_names_of_leftovers_stop_nothing_and_are_kept(tmp_path):
    run = saved(tmp_path / "run", 5, 10)
    (run / ".iter_0000005.old").mkdir()
    (run / ".iter_0000005.old" / "file").touch()
    remove_old(run, 10, keep_last=1, keep_every=0)
    assert names(run) == [".iter_0000005.old", "iter_0000010"]
    (run / ".iter_0000005.tmp").write_text("mine")
    (run / ".iter_0000006.tmp").symlink_to("nowhere")
    remove_leftovers(run)
    assert names(run) == [".iter_0000005.tmp.set-aside-1", ".iter_0000006.tmp.set-aside-1", "iter_0000010"]
