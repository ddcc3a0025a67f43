"""The other version of megatron-core: the same losses, and checkpoints that go both ways.

RSFT_OTHER_PYTHON names the Python of an environment that has it, as `make VENV=.venv-3.12 PYTHON=python3.12 lint`
makes one.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import TESTS, random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common.artifact import write_json
from rsft_lib.model import engine
from rsft_lib.training.metrics import MetricsWriter, read_metrics

OTHER, STEPS = os.environ.get("RSFT_OTHER_PYTHON", ""), 6
pytestmark = pytest.mark.skipif(
    not OTHER, reason="RSFT_OTHER_PYTHON is not set to the Python of an environment with the other megatron-core"
)
TRAIN = """
import sys
from support import trained
from rsft_lib.training.config import TrainConfig
trained(TrainConfig.from_file(sys.argv[1]))
"""


def train(python: str, inputs: Path, run: Path, **changes) -> list[float]:
    """Start or resume the run in the folder `run` with an environment's Python; returns its losses."""
    given = {"checkpoint": str(inputs / "megatron"), "data": str(inputs / "data"), "output": str(run)}
    config = settings(train_iters=STEPS, save_interval=STEPS // 2, **{**given, **changes})
    write_json(run.with_suffix(".json"), config.to_json())
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    subprocess.run([python, "-c", TRAIN, str(run.with_suffix(".json"))], check=True, env=environment)
    return [record["loss"] for record in read_metrics(run)]


def test_the_other_environment_has_another_version():
    ask = "from importlib.metadata import version; print(version('megatron-core'))"
    found = subprocess.run([OTHER, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    assert found != engine.VERSION


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "data")
    return folder


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for python, name in ((sys.executable, "here"), (OTHER, "there")):
        train(python, inputs, folder / name)
    return {name: folder / name for name in ("here", "there")}


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def test_both_have_the_same_losses(runs):
    assert losses(runs["there"]) == pytest.approx(losses(runs["here"]), rel=1e-6)


@pytest.mark.parametrize("began, goes_on", [("here", OTHER), ("there", sys.executable)], ids=["to it", "from it"])
def test_a_run_of_one_version_resumes_with_the_other(began, goes_on, inputs, runs, tmp_path):
    shutil.copytree(runs[began], tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    MetricsWriter(tmp_path / "run", STEPS // 2)  # removes the records of later steps
    assert train(goes_on, inputs, tmp_path / "run") == pytest.approx(losses(runs["here"]), rel=1e-6)
    assert "resumed from" in (tmp_path / "run" / "train.log").read_text()
