"""The length of a run in epochs, as set in notebook 05."""

import dataclasses
import json
import math

from support import ROOT, random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.display.runs.runs import find_runs, runs_table
from rsft_lib.launch import launch_training, start_training
from rsft_lib.notebook import run
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

EPOCHS = 0.3


def test_epochs_of_the_notebook_are_steps_wherever_they_are_read_and_more_of_them_continue_the_run(tmp_path, capsys):
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    convert(tmp_path / "hf", tmp_path / "megatron")
    store, output = random_store(tmp_path / "data"), tmp_path / "run"
    place = {"checkpoint": str(tmp_path / "megatron"), "data": str(store), "output": str(output)}
    given = {name: value for name, value in settings(**place).to_json().items() if name != "train_iters"}
    _, status = run(ROOT / "notebooks" / "05_train.ipynb", tmp_path, {**given, "nproc": 1, "epochs": EPOCHS})

    packs = len(PackedDataset(TokenStore(store), 96, seed=1234))
    steps = math.ceil(EPOCHS * packs / 4)
    assert status["iteration"] == len(read_metrics(output)) == steps and status["ended"] == "finished"
    config = json.loads((output / "config.json").read_text())
    assert (config["train_iters"], config["epochs"]) == (steps, EPOCHS)
    assert f"{steps} of {steps}" in repr(runs_table(find_runs(str(output))))
    assert (
        f"{steps} steps, 0.3 epochs; epochs=0.3 overrides train_iters=500" in (tmp_path / "05_train.ipynb").read_text()
    )

    asked = settings(**given | {"epochs": EPOCHS})  # overrides train_iters
    assert asked.train_iters == TrainConfig(**place).train_iters != steps
    assert start_training(asked, 1).train_iters == steps and "already finished" in capsys.readouterr().out
    launch_training(dataclasses.replace(asked, epochs=2 * EPOCHS), 1)
    assert len(read_metrics(output)) == math.ceil(2 * EPOCHS * packs / 4) > steps
