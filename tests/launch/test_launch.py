"""Real torchrun, real signals."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from processes import survivors, wait_until
from support import TESTS

from rsft_lib.launch import launch
from rsft_lib.launch.job import ENVIRONMENT

# Started in the background of a shell it would ignore SIGINT; a kernel never does.
CALLER = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
CALLER += "from pathlib import Path; from rsft_lib.launch import launch; folder = Path(sys.argv[1]); "
CALLER += "launch('rank', [str(folder), 'sleep'], 2, folder / 'train.log')"


@pytest.fixture(autouse=True)
def rank_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def started(tmp_path):
    """A process that waits in `launch`, like a notebook's kernel, while two ranks sleep without output."""
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(tmp_path)], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.glob("rank*.pid"))) == 2, 300, "both ranks start")
    assert len(survivors(tmp_path)) == 4  # the caller, torchrun, two ranks
    yield caller, tmp_path
    for process in [caller, *survivors(tmp_path)]:
        process.kill()
    caller.wait()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_nothing_survives_the_caller(started, name):
    caller, folder = started
    caller.send_signal(getattr(signal, name))
    assert caller.wait(timeout=300) != 0
    wait_until(lambda: not survivors(folder), 300, f"all ranks end after {name}")


def test_nothing_survives_a_killed_torchrun_and_the_caller_fails(started):
    caller, folder = started
    (torchrun,) = psutil.Process(caller.pid).children()
    assert "rsft_lib.launch.torchrun" in torchrun.cmdline()
    torchrun.kill()
    assert caller.wait(timeout=300) == 1
    wait_until(lambda: not survivors(folder), 300, "all ranks end after torchrun was killed")


@pytest.mark.parametrize("what", ["fail", "fail-recorded"])
def test_a_failing_rank_is_an_error_with_its_traceback_and_the_log(tmp_path, what):
    log = tmp_path / "train.log"
    with pytest.raises(RuntimeError) as error:
        launch("rank", [str(tmp_path), what], 2, log)
    message = str(error.value)
    assert message.startswith("rank 1: Traceback" if what == "fail-recorded" else "Traceback")
    assert "exit code 1" in message and str(log) in message
    assert "Traceback" in message and "KeyError: 'broken on rank 1'" in message
    assert not survivors(tmp_path)


def test_an_error_while_polling_stops_the_ranks(tmp_path):
    def poll():
        if len(list(tmp_path.glob("rank*.pid"))) == 2:
            raise ZeroDivisionError("from the poll")

    with pytest.raises(ZeroDivisionError, match="from the poll"):
        launch("rank", [str(tmp_path), "sleep"], 2, tmp_path / "train.log", poll)
    assert not survivors(tmp_path)


def test_ranks_that_ignore_the_request_to_stop_are_killed(tmp_path):
    def interrupt():
        if len(list(tmp_path.glob("rank*.pid"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch("rank", [str(tmp_path), "stubborn"], 2, tmp_path / "train.log", interrupt, patience=2)
    assert not survivors(tmp_path)


def test_all_ranks_write_one_log_and_share_the_cores(tmp_path, monkeypatch):
    for name in ("OMP_NUM_THREADS", *ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")  # some builds of torch refuse nonsense
    polled = []
    launch("rank", [str(tmp_path), "finish"], 2, tmp_path / "new" / "train.log", lambda: polled.append(1))
    threads = max(1, os.cpu_count() // 2)
    log = (tmp_path / "new" / "train.log").read_text()
    line = f"was here with threads and settings {threads} max_split_size_mb:512 1 1 1 1 1 1\n"
    assert all(f"rank {rank} {line}" in log for rank in (0, 1))
    assert "Warning" not in log
    assert polled
