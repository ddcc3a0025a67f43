"""One rank against several, and a run against one that was stopped: pytest tests/test_layouts.py

Every comparison is between whole trainings, started as a user starts them.
"""

import shutil
from pathlib import Path

import pytest
import torch
from support import all_tensors, random_store, settings, tiny_model, trained

from rsft_lib.artifact import newest
from rsft_lib.checkpoint.convert import convert
from rsft_lib.training.metrics import MetricsWriter, read_metrics

STEPS = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", samples=120)
    random_store(folder / "heldout", samples=20, seed=1)
    return {
        "checkpoint": str(folder / "megatron"), "data": str(folder / "train"), "eval_data": str(folder / "heldout"),
    }  # fmt: skip


def run(inputs: dict, output: Path, nproc: int = 1, **changes) -> list[dict]:
    config = settings(
        **inputs, output=str(output), train_iters=STEPS, save_interval=STEPS // 2, eval_interval=5, **changes
    )
    return trained(config, nproc)


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    return output, run(inputs, output)


LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor_parallel": 2}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "tp2pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
}


@pytest.fixture(scope="module")
def layouts(inputs, tmp_path_factory):
    """Runs each layout once, when it is first asked for."""
    done = {}

    def of(name: str):
        if name not in done:
            nproc, changes = LAYOUTS[name]
            output = tmp_path_factory.mktemp(name) / "run"
            done[name] = output, run(inputs, output, nproc, **changes)
        return done[name]

    return of


def same_curve(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [r["iteration"] for r in found] == [r["iteration"] for r in expected] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "eval_loss", "lr", "trained_tokens"):
        a, b = ([r[key] for r in records if key in r] for records in (found, expected))
        assert a == pytest.approx(b, rel=tolerance, abs=0), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_curve_and_the_weights_of_one_rank(layout, layouts, one_rank):
    output, metrics = layouts(layout)
    same_curve(metrics, one_rank[1], tolerance=1e-4)
    ours, expected = (all_tensors(newest(folder)) for folder in (output, one_rank[0]))
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_training_moves_every_weight_and_lowers_the_loss(inputs, one_rank):
    output, metrics = one_rank
    before, after = all_tensors(Path(inputs["checkpoint"])), all_tensors(newest(output))
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def stopped_half_way(run_folder: Path, copy: Path) -> Path:
    """A run as it is when it was killed after the middle checkpoint, some steps later."""
    shutil.copytree(run_folder, copy)
    shutil.rmtree(newest(copy))
    MetricsWriter(copy, STEPS - 2)
    return copy


def test_five_steps_and_five_after_a_resume_are_ten_bit_for_bit(inputs, one_rank, tmp_path):
    output = stopped_half_way(one_rank[0], tmp_path / "run")
    metrics = run(inputs, output)
    assert f"resumed from {output / 'iter_0000005'}" in (output / "train.log").read_text()
    same_curve(metrics, one_rank[1], tolerance=0)
    resumed, straight = all_tensors(newest(output)), all_tensors(newest(one_rank[0]))
    assert [name for name, tensor in resumed.items() if not torch.equal(tensor, straight[name])] == []


def test_bf16_follows_fp32_and_resumes_bit_for_bit(inputs, one_rank, tmp_path):
    straight = run(inputs, tmp_path / "straight", precision="bf16")
    assert [r["loss"] for r in straight] == pytest.approx([r["loss"] for r in one_rank[1]], rel=0.01)
    resumed = run(inputs, stopped_half_way(tmp_path / "straight", tmp_path / "resumed"), precision="bf16")
    same_curve(resumed, straight, tolerance=0)


def test_a_checkpoint_of_two_by_two_ranks_resumes_on_one(inputs, layouts, one_rank, tmp_path):
    output = stopped_half_way(layouts("tp2pp2")[0], tmp_path / "run")
    same_curve(run(inputs, output), one_rank[1], tolerance=1e-4)


def test_a_damaged_checkpoint_is_passed_over(inputs, one_rank, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(one_rank[0], output)
    shard = next(newest(output).glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    same_curve(run(inputs, output), one_rank[1], tolerance=0)
    log = (output / "train.log").read_text()
    assert f"stepping back: {shard}" in log and "resumed from" in log


def test_a_finished_run_is_found_finished(inputs, one_rank, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(one_rank[0], output)
    before = (output / "metrics.jsonl").read_bytes()
    run(inputs, output)
    assert (output / "metrics.jsonl").read_bytes() == before


def test_a_run_is_not_continued_with_other_settings(inputs, one_rank, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(one_rank[0], output)
    with pytest.raises(RuntimeError, match=r"belongs to another run:\n +lr: was 0.001, now 0.002\n +seed: was 1234"):
        run(inputs, output, lr=2e-3, seed=2)
    assert len(read_metrics(output)) == STEPS


def test_a_failed_rank_leaves_its_reason_and_no_checkpoint(inputs, tmp_path):
    with pytest.raises(RuntimeError, match="seq_length 16 holds 17: raise seq_length"):
        run(inputs, tmp_path / "run", seq_length=16)
    assert newest(tmp_path / "run") is None
