"""Interrupt and kill notebooks that train, with the real papermill and kernels.

By `on_interrupt`, the training must save and leave no process behind, or continue and be found again.
"""

import os
import signal
import subprocess
import sys

import nbformat
import psutil
import pytest
from processes import survivors, wait_until
from real import LONG
from support import TESTS

from rsft_lib import launch

# The ranks of tests/rank.py do not train, but save when they are asked to stop, which takes them a second.
CELL = """
from rsft_lib import launch
from rsft_lib.launch import local
from rsft_lib.training.config import TrainConfig

local.TRAIN = "rank"
config = TrainConfig(checkpoint="/", data="/", output=FOLDER, save_timeout=20)
job = launch.start_training(config, 2, launch.LaunchOptions(on_interrupt=CHOICE))
job.wait()
"""
WHO = [  # (process to end, signal, on_interrupt)
    ("papermill", "SIGTERM", "stop"), ("papermill", "SIGKILL", "leave"),
    ("kernel", "SIGKILL", "stop"), ("kernel", "SIGINT", "leave"),
]  # fmt: skip
if LONG:
    WHO += [("papermill", "SIGTERM", "leave"), ("papermill", "SIGKILL", "stop")]
    WHO += [("kernel", "SIGKILL", "leave"), ("kernel", "SIGINT", "stop")]


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Start a notebook that trains in `tmp_path/run`; returns papermill's process and the kernel's."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)
    # Ranks do not depend on torchrun's shutdown timeout: in torch 2.11 it is always 30 seconds.
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    run, started = tmp_path / "run", []

    def start(choice: str) -> tuple[psutil.Process, psutil.Process]:
        source = CELL.replace("FOLDER", repr(str(run))).replace("CHOICE", repr(choice))
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, tmp_path / "train.ipynb")
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(tmp_path / "train.ipynb")]
        process = subprocess.Popen([*command, str(tmp_path / "out.ipynb")], stderr=subprocess.DEVNULL)
        started.append(process)
        wait_until(lambda: len(list(run.glob("rank*.pid"))) == 2, 300, "both ranks start", run / "train.log")
        (kernel,) = psutil.Process(process.pid).children()
        return process, kernel

    yield start, run
    for process in [*started, *survivors(tmp_path)]:
        process.kill()


@pytest.mark.parametrize(("who", "how", "choice"), WHO)
def test_a_training_follows_on_interrupt_when_its_notebook_ends(notebook, who, how, choice):
    start, run = notebook
    papermill, kernel = start(choice)
    (papermill if who == "papermill" else kernel).send_signal(getattr(signal, how))
    assert papermill.wait(timeout=300) != 0
    wait_until(lambda: not kernel.is_running(), 300, "the kernel ends")
    if choice == "leave":
        assert len(survivors(run)) == 3  # torchrun and two ranks
        job = launch.attach(run)
        job.stop()
        job.wait()
    wait_until(lambda: not survivors(run), 300, "torchrun and all ranks end")
    assert launch.attach(run) is None
    assert '"SIGTERM"' in (run / "ended.json").read_text()  # saved
