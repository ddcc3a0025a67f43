"""Settings, schedule and metrics of a run: pytest tests/test_training_parts.py"""

import json
import math

import pytest
import torch
from support import settings

from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import FILE, MetricsWriter, read_metrics
from rsft_lib.training.optimizer import build_schedule


def config(**changes):
    return settings(checkpoint="c", data="d", output="o", **changes)


def test_defaults_are_those_of_the_original():
    defaults = TrainConfig(checkpoint="c", data="d", output="o")
    original = {
        "lr": 1e-5, "min_lr": 1e-6, "warmup_fraction": 0.05, "weight_decay": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "clip_grad": 1.0, "global_batch_size": 128, "micro_batch_size": 1, "seq_length": 16384,
        "train_iters": 17000, "save_interval": 1000, "log_interval": 10, "eval_interval": 100, "eval_iters": 10,
    }  # fmt: skip
    assert {name: getattr(defaults, name) for name in original} == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 0}, "train_iters is 0"),
        ({"global_batch_size": 1.5}, "global_batch_size is 1.5"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"min_lr": 1.0}, "min_lr 1.0 is above lr"),
        ({"precision": "fp8"}, "choose 'bf16' or 'fp32'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_ranks_that_do_not_fit_are_refused_before_anything_starts():
    assert config(tensor_parallel=2).data_parallel(8) == 4
    with pytest.raises(ValueError, match="3 ranks do not divide by tensor_parallel 2 x pipeline_parallel 1"):
        config(tensor_parallel=2).data_parallel(3)
    with pytest.raises(ValueError, match="global_batch_size 4 does not divide by micro_batch_size 1 x 3"):
        config().data_parallel(3)


def test_a_file_with_an_unknown_setting_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config().to_json()))
    assert TrainConfig.from_json(path) == config()
    path.write_text(json.dumps(config().to_json() | {"lrr": 1}))
    with pytest.raises(ValueError, match=r"unknown settings \['lrr'\]"):
        TrainConfig.from_json(path)


def test_the_schedule_warms_up_and_follows_a_cosine_to_its_end():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    run = config(lr=1.0, min_lr=0.1, train_iters=100, warmup_fraction=0.1)
    schedule, rates = build_schedule(run, optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * (n - 10) / 90)) / 2 for n in range(11, 101)]
    assert rates[10:] == pytest.approx(cosine)


def test_metrics_after_the_checkpoint_that_is_resumed_are_taken_back(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for iteration in (1, 2, 3):
        writer.write(iteration=iteration, loss=1 / iteration)
    MetricsWriter(tmp_path, 2).write(iteration=3, loss=9.0)
    assert [(r["iteration"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    MetricsWriter(tmp_path, 0).write(iteration=1)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"iteration": 2, "lo')
    assert read_metrics(tmp_path) == [{"iteration": 1}]
    assert read_metrics(tmp_path / "elsewhere") == []
