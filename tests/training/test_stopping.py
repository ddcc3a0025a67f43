"""Runs that end early: by a signal, a time limit, an error or a hang."""

import errno
import math
import os
import signal
import time
from pathlib import Path

import forked
import psutil
import pytest
import torch
from megatron.core import parallel_state
from processes import survivors, wait_until
from support import TESTS, all_tensors, random_store, record_checksums, settings, tiny_model

from rsft_lib import launch
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common import artifact
from rsft_lib.common.artifact import write_json
from rsft_lib.common.hashing_writer import HashedFile
from rsft_lib.training import loop, saving, signals, watchdog
from rsft_lib.training.metrics import read_metrics
from rsft_lib.training.run_folder import read_ended

STEPS = 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", samples=60)
    return {"checkpoint": str(folder / "megatron"), "data": str(folder / "train")}


def config(inputs: dict, output: Path, **changes):
    return settings(**{"output": str(output), "train_iters": STEPS, **inputs, **changes})


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("straight") / "run"
    forked.train(config(inputs, output), 2)
    return output


def wait_for_steps(output: Path, steps: int) -> None:
    wait_until(
        lambda: output.exists() and len(read_metrics(output)) >= steps, 300, f"{steps} steps", output / "train.log"
    )


@pytest.mark.parametrize(("name", "ranks"), [("SIGTERM", (0, 1)), ("SIGINT", (1,))])
def test_a_signal_to_any_rank_saves_the_step_on_all_and_the_run_goes_on_as_if_nothing_was(
    inputs, straight, tmp_path, name, ranks
):
    output, run = tmp_path / "run", config(inputs, tmp_path / "run", keep_last=1, hang_timeout=600)
    processes = forked.start(_wait_in_the_third_step, 2, output / "train.log", run)
    wait_for_steps(output, 3)
    for rank in ranks:
        os.kill(processes[rank].pid, getattr(signal, name))
    (output / "go on").touch()
    forked.join(processes, output / "train.log")
    assert read_ended(output) == {"reason": name, "iteration": 3}
    assert newest(output).name == "iter_0000003" and len(read_metrics(output)) == 3

    forked.train(run, 2)
    assert read_ended(output) == {"reason": "finished", "iteration": STEPS}
    assert [r["loss"] for r in read_metrics(output)] == [r["loss"] for r in read_metrics(straight)]
    found, expected = all_tensors(newest(output)), all_tensors(newest(straight))
    assert [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])] == []


def _wait_in_the_third_step(run) -> None:
    write = loop.Run._write

    def then_wait(self, record, last):
        write(self, record, last)
        while record["iteration"] == 3 and not (Path(run.output) / "go on").exists():
            time.sleep(0.01)

    loop.Run._write = then_wait
    forked.train_as_rank(run)


def test_a_second_sigterm_does_not_interrupt_a_save_but_a_sigint_does(inputs, tmp_path):
    output = tmp_path / "run"
    processes = forked.start(_save_slowly, 1, output / "train.log", config(inputs, output))
    wait_for_steps(output, 1)
    os.kill(processes[0].pid, signal.SIGTERM)
    wait_until((output / "saving").exists, 120, "it saves", output / "train.log")
    os.kill(processes[0].pid, signal.SIGTERM)
    processes[0].join(1)
    assert processes[0].exitcode is None
    os.kill(processes[0].pid, signal.SIGINT)
    processes[0].join(120)
    assert processes[0].exitcode == 128 + signal.SIGINT


def _save_slowly(run) -> None:
    def save(*_, **__):
        (Path(run.output) / "saving").touch()
        time.sleep(600)

    loop.Saver.save = save
    forked.train_as_rank(run)


def test_the_time_limit_saves_and_stops(inputs, tmp_path):
    output = tmp_path / "run"
    forked.train(config(inputs, output, train_iters=100_000, time_limit=4 / 60), 1)
    ended = read_ended(output)
    assert ended["reason"] == "time limit" and newest(output).name == f"iter_{ended['iteration']:07d}"


def test_a_run_stops_if_another_step_like_the_longest_would_exceed_the_time_limit(monkeypatch):
    now, reasons = 0.0, []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    asked = signals.Stop(minutes=1)
    for seconds in (10, 15, 10, 10, 10):
        now += seconds
        asked.look_at_the_clock(seconds)
        reasons.append(signals.REASONS[asked.reason])
    assert reasons == ["", "", "", "", "time limit"]  # after 45 seconds there was room for 15 more


def test_an_alarm_is_recorded_and_stops_the_run_if_configured(inputs, tmp_path):
    output = tmp_path / "run"
    forked.join(
        forked.start(_alarmed, 2, output / "train.log", config(inputs, output, alarm_stop=True)), output / "train.log"
    )
    assert read_ended(output) == {"reason": "alarm", "iteration": 3}
    assert [r.get("alarms") for r in read_metrics(output)] == [None, None, ["on fire"]]
    assert "ALARM after step 3: on fire" in (output / "train.log").read_text()


def _alarmed(run) -> None:
    loop.Alarms.look = lambda self, record, load: ["on fire"] if record["iteration"] == 3 else []
    forked.train_as_rank(run)


def test_a_nan_loss_ends_the_run_before_the_update(inputs, straight, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(RuntimeError, match="step 3: loss nan.*nothing was updated or saved"):
        run = config(inputs, output, save_interval=2)
        forked.join(forked.start(_broken, 1, output / "train.log", run), output / "train.log")
    assert newest(output).name == "iter_0000002" and len(read_metrics(output)) == 2
    report = (output / "broken_step_0000003.json").read_text()
    assert '"loss": "nan"' in report and '"samples": [' in report


def _broken(run) -> None:
    compute, steps = loop.run_batch, []

    def break_the_third(*arguments):
        steps.append(1)
        return compute(*arguments) * (math.nan if len(steps) == 3 else 1)

    loop.run_batch = break_the_third
    forked.train_as_rank(run)


def test_a_save_may_take_longer_than_the_hang_timeout(inputs, tmp_path):
    output = tmp_path / "run"
    run = config(inputs, output, train_iters=2, save_interval=1)
    forked.join(forked.start(_take_long_to_save, 1, output / "train.log", run), output / "train.log")
    assert sorted(path.name for path in output.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


def _take_long_to_save(run) -> None:
    gather, publish = saving.content, saving.publish

    def slowly(function):
        def slow(*arguments):
            _let_pass(run.hang_timeout + 100)
            return function(*arguments)

        return slow

    saving.content, saving.publish = slowly(gather), slowly(publish)
    forked.train_as_rank(run)


def _let_pass(seconds: float) -> None:
    """Set the watchdog's clock forward, and let it check."""
    clock = watchdog.clock
    watchdog.clock = lambda: clock() + seconds
    time.sleep(3 * watchdog.LOOK)


def test_loading_a_checkpoint_may_take_longer_than_the_start_timeout(inputs, tmp_path):
    output = tmp_path / "run"
    run = config(inputs, output, train_iters=1, save_timeout=1200)
    forked.join(forked.start(_take_long_to_read, 1, output / "train.log", run), output / "train.log")
    assert newest(output).name == "iter_0000001"
    assert (output / "waits").read_text() == "20 minutes in the world, 20 in a group"


def _take_long_to_read(run) -> None:
    begin = loop.begin

    def slowly(*arguments):
        world, group = torch.distributed.group.WORLD, parallel_state.get_tensor_model_parallel_group()
        waits = [g._get_backend(torch.device("cpu")).options._timeout.seconds // 60 for g in (world, group)]
        (Path(run.output) / "waits").write_text("{} minutes in the world, {} in a group".format(*waits))
        _let_pass(watchdog.START + 100)
        begin(*arguments)

    loop.begin = slowly
    forked.train_as_rank(run)


@pytest.mark.parametrize("where", ["saving", "reading"])
def test_a_save_or_a_start_that_never_ends_does_end(inputs, tmp_path, where):
    output = tmp_path / "run"
    run = config(inputs, output, train_iters=1, save_timeout=1200)
    with pytest.raises(RuntimeError, match=r"exit codes \[1\]"):
        forked.join(forked.start(_never_end, 1, output / "train.log", run, where), output / "train.log")
    (stack,) = watchdog.read_stacks(output).values()
    assert stack.startswith("no progress for 1200 s") and "in _let_pass" in stack


def _never_end(run, where: str) -> None:
    module, name = (saving, "content") if where == "saving" else (loop, "begin")
    setattr(module, name, lambda *_: _let_pass(1300) or time.sleep(600))
    forked.train_as_rank(run)


def test_until_the_first_micro_batch_the_watch_waits_for_a_start_and_then_for_a_hang(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda seconds, **_: waits.append(seconds))
    with watchdog.watched(tmp_path, 0, 1, 45):
        with watchdog.deadline(1800):
            pass
        watchdog.beat()
        with watchdog.deadline(1800):
            pass
    waits = [seconds - watchdog.LATE for seconds in waits]
    assert waits == [watchdog.START, 1800, watchdog.START, 45, 1800, 45]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(tmp_path.glob("stacks/*[0-9].txt"))


def test_stacks_of_a_run_before_do_not_end_this_one_and_those_of_a_call_that_returned_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "LATE", -44.5)  # half a second after a beat
    (tmp_path / "stacks").mkdir()
    own, other, fired, ended = (
        (tmp_path / "stacks" / f"{name}.txt") for name in ("rank0", "rank1", "fired", "sigterm0")
    )
    for path in (own, other, fired, ended):
        path.write_text("of the run before")
    with watchdog.watched(tmp_path, 0, 2, 45):
        watchdog.beat()
        wait_until(own.read_text, 60, "stacks are written")
        monkeypatch.setattr(watchdog, "LATE", 10)  # or a slow machine has them written again before they are read
        watchdog.beat()
        assert own.read_text() == "" == fired.read_text()
        time.sleep(3 * watchdog.LOOK)
    assert not own.exists()


def test_stacks_that_are_being_written_are_complete_before_their_file_is_emptied(tmp_path, monkeypatch):
    own, rest = tmp_path / "stacks" / "rank0.txt", []

    def finish(*_, **__):  # what both functions of faulthandler do first
        with own.open("a") as file:
            file.write(rest.pop() if rest else "")

    for name in ("cancel_dump_traceback_later", "dump_traceback_later"):
        monkeypatch.setattr(watchdog.faulthandler, name, finish)
    with watchdog.watched(tmp_path, 0, 1, 45):
        own.write_text("the first half")
        rest.append(" and the second")
        watchdog.beat()
        assert not rest and own.read_text() == ""


def test_every_rank_hashes_what_it_writes_and_no_byte_is_read_or_summed_again(inputs, tmp_path):
    output = tmp_path / "run"
    run = config(inputs, output, train_iters=1, pipeline_parallel=2)
    forked.join(forked.start(_record_what_is_hashed, 2, output / "train.log", run), output / "train.log")
    checkpoint = newest(output)  # which checks every hash
    files = {path.name for path in checkpoint.glob("*.distcp")}
    assert {name[:4] for name in files} == {"__0_", "__1_"}
    hashed = (output / "hashed").read_text().split()
    assert ".metadata" in hashed and not files & set(hashed)
    assert record_checksums(checkpoint) == {0}


def _record_what_is_hashed(run) -> None:
    hashes = artifact._hashes

    def record(folder, names):
        (Path(run.output) / "hashed").write_text("\n".join(names))
        return hashes(folder, names)

    artifact._hashes = record
    forked.train_as_rank(run)


def test_a_disk_that_is_full_for_one_rank_ends_the_run_on_all_with_what_was_saved_before(inputs, tmp_path):
    output = tmp_path / "run"
    run = config(inputs, output, train_iters=4, save_interval=1, pipeline_parallel=2)
    processes = forked.start(_fill_the_disk, 2, output / "train.log", run)
    with pytest.raises(RuntimeError, match="No space left on the disk of rank 1") as error:
        forked.join(processes, output / "train.log")
    assert "exit codes [1, 1]" in str(error.value)
    assert newest(output).name == "iter_0000001" and len(list(output.glob("iter_*"))) == 1


def _fill_the_disk(run) -> None:
    write = HashedFile.write

    def full(self, data):
        if "iter_0000002" in str(self.path) and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on the disk of rank 1")
        return write(self, data)

    HashedFile.write = full
    forked.train_as_rank(run)


def end_of_two_ranks_that(do: str, inputs: dict, output: Path, monkeypatch) -> str:
    """The error message of a run in which tests/sleepy.py replaces the third micro-batch."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    monkeypatch.setenv("RANKS_SHALL", do)
    output.mkdir()
    run = config(inputs, output, global_batch_size=8)
    write_json(output / "config.json", run.to_json())
    with pytest.raises(launch.RunFailed) as error:
        arguments = ["--config", str(output / "config.json")]
        launch.launch("sleepy", arguments, 2, output / "train.log", patience=run.save_timeout)
    assert not survivors(output)
    return str(error.value)


@pytest.mark.parametrize("do", ["sleep", "hold the lock"])
def test_a_hanging_rank_ends_the_run_and_every_rank_writes_its_stack(inputs, tmp_path, monkeypatch, do):
    message = end_of_two_ranks_that(do, inputs, tmp_path / "run", monkeypatch)
    assert message.startswith("no progress; stacks of the ranks:\nrank 0: "), message
    first, second = message.split("\n\nrank 1: ")
    whys = ["at this time rank 1 noticed: no progress for 45 s", "no progress for 45 s"]
    if do == "hold the lock":
        whys = ["no progress for 45 s", "Timeout (0:00:05)!"]
    assert [first.splitlines()[1], second.splitlines()[0]] == [f"rank 0: {whys[0]}", whys[1]], message
    for stack in (first, second):
        assert "rsft_lib/training/batches.py" in stack and "in run_batch\n" in stack, message
    assert "in fall_asleep" in second and "in fall_asleep" not in first, message
    if do == "hold the lock":  # it could not handle torchrun's SIGTERM
        assert "in fall_asleep" in (tmp_path / "run" / "stacks" / "sigterm1.txt").read_text()


def test_a_rank_ended_before_its_watchdog_fired_has_its_stack_at_sigterm(tmp_path):
    (tmp_path / "stacks").mkdir()
    for name, text in {"rank0": "", "rank1": "", "sigterm0": "ended", "sigterm1": "ended as well"}.items():
        (tmp_path / "stacks" / f"{name}.txt").write_text(text)
    assert watchdog.read_stacks(tmp_path) == {}  # it was stopped, and did not hang
    (tmp_path / "stacks" / "rank1.txt").write_text("hung\n")
    assert watchdog.read_stacks(tmp_path) == {"rank 0": "ended", "rank 1": "hung"}


def test_a_failing_rank_is_reported_even_if_the_others_hang(inputs, tmp_path, monkeypatch):
    message = end_of_two_ranks_that("fail", inputs, tmp_path / "run", monkeypatch)
    assert message.startswith("rank 1: Traceback") and "KeyError: 'broken on rank 1'" in message, message
    assert "in fall_asleep" in watchdog.read_stacks(tmp_path / "run")["rank 0"]


def test_a_killed_rank_ends_the_run_at_once(inputs, tmp_path):
    output = tmp_path / "run"
    killed = []

    def kill_a_rank() -> None:
        if len(read_metrics(output)) >= 2 and not killed:
            (torchrun,) = (p for p in psutil.Process().children() if "rsft_lib.launch.torchrun" in p.cmdline())
            rank = next(p for p in torchrun.children() if p.environ()["RANK"] == "1")
            rank.kill()
            killed.append(rank)

    with pytest.raises(RuntimeError, match="rsft_lib.training.train failed"):
        launch.launch_training(
            config(inputs, output, train_iters=100_000, async_save=True, save_interval=1), 2, kill_a_rank
        )
    wait_until(lambda: not survivors(output), 120, "all ranks are gone", output / "train.log")
