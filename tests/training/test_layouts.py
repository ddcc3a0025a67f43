"""Trainings with one rank compared with trainings at every kind of parallelism.

Every comparison is between whole trainings, by the same function that torchrun starts. RSFT_LONG_TESTS=1 adds
redundant layouts.
"""

import os
import shutil

import forked
import pytest
import torch
from families import tiny_family
from support import VOCAB, all_tensors, random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.training import build
from rsft_lib.training.metrics import read_metrics

STEPS = 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf", num_hidden_layers=6)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", samples=120)
    random_store(folder / "heldout", samples=20, seed=1)
    return {
        "checkpoint": str(folder / "megatron"), "data": str(folder / "train"), "eval_data": str(folder / "heldout"),
    }  # fmt: skip


def run(inputs: dict, output, nproc: int = 1, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """(metrics, every tensor of the last checkpoint)"""
    config = settings(**inputs, output=str(output), train_iters=STEPS, eval_interval=STEPS, eval_iters=1, **changes)
    forked.train(config, nproc)
    assert "differs from rank 0" not in (output / "train.log").read_text()
    return read_metrics(output), all_tensors(newest(output))


TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def one_rank(inputs, tmp_path_factory):
    return run(inputs, tmp_path_factory.mktemp("one") / "run")


LAYOUTS = {
    "dp2": (2, {}),
    "dp2 without overlap": (2, {"overlap": False}),
    "dp4": (4, {}),
    "tp2": (2, {"tensor_parallel": 2}),
    "tp2 sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    "tp4, more ranks than key-value heads": (4, {"tensor_parallel": 4}),
    "pp2": (2, {"pipeline_parallel": 2}),
    "pp3": (3, {"pipeline_parallel": 3}),
    "pp2 vpp3": (2, {"pipeline_parallel": 2, "virtual_pipeline": 3}),
    "cp4": (4, {"context_parallel": 4}),
    "tp2 pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "cp2 dp2": (4, {"context_parallel": 2}),
    "cp2 full recomputation": (2, {"context_parallel": 2, "recompute": "full"}),
    "cp2 tp2 sp": (4, {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True}),
    "pp2 vpp3 tp2 sp": (
        4,
        {"pipeline_parallel": 2, "virtual_pipeline": 3, "tensor_parallel": 2, "sequence_parallel": True},
    ),
    "full recomputation": (1, {"recompute": "full"}),
    "selective recomputation": (1, {"recompute": "selective"}),
    "pp2, the same in two of three layers": (
        2,
        {"pipeline_parallel": 2, "recompute": "selective", "recompute_layers": 2},
    ),
    "full recomputation in one layer": (1, {"recompute": "full", "recompute_layers": 1}),
    "micro-batches of two packs": (1, {"micro_batch_size": 2}),
}
if os.environ.get("RSFT_LONG_TESTS"):
    LAYOUTS |= {
        "tp4 sp": (4, {"tensor_parallel": 4, "sequence_parallel": True}),
        "cp2": (2, {"context_parallel": 2}),
        "tp2 dp2": (4, {"tensor_parallel": 2}),
        "cp2 pp2": (4, {"context_parallel": 2, "pipeline_parallel": 2}),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_the_losses_and_weights_of_one_rank(layout, inputs, one_rank, tmp_path):
    nproc, changes = LAYOUTS[layout]
    metrics, tensors = run(inputs, tmp_path / "run", nproc, **changes)
    expected_metrics, expected = one_rank
    assert [r["iteration"] for r in metrics] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "eval_loss", "lr", "trained_tokens", "samples_sha256"):
        a, b = ([r[key] for r in records if key in r] for records in (metrics, expected_metrics))
        assert a == (b if key == "samples_sha256" else pytest.approx(b, rel=1e-5, abs=0)), key
    same(tensors, expected)


@pytest.fixture(scope="module")
def with_experts(inputs, tmp_path_factory):
    """(inputs with a Qwen3-MoE, the result of training it on one rank)"""
    folder = tmp_path_factory.mktemp("experts")
    tiny_family(folder / "hf", "qwen3_moe", vocab_size=VOCAB)
    convert(folder / "hf", folder / "megatron")
    changed = inputs | {"checkpoint": str(folder / "megatron"), "router_aux_loss": 0.5}
    return changed, run(changed, folder / "one")


EXPERT_LAYOUTS = {
    "dp2": (2, {}),
    "ep2": (2, {"expert_parallel": 2}),
    "ep4 full recomputation": (4, {"expert_parallel": 4, "recompute": "full"}),
    "ep2 dp2": (4, {"expert_parallel": 2}),
    "tp2 sp": (2, TP2_SP),
    "tp2 sp etp2": (2, {**TP2_SP, "expert_tensor_parallel": 2}),
    "tp2 sp ep2 pp2": (4, {**TP2_SP, "expert_parallel": 2, "pipeline_parallel": 2}),
    "cp2 ep2": (2, {"context_parallel": 2, "expert_parallel": 2}),
    "pp2 vpp2 ep2": (4, {"pipeline_parallel": 2, "virtual_pipeline": 2, "expert_parallel": 2}),
    "selective recomputation": (1, {"recompute": "selective"}),
}


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_a_model_with_experts_matches_one_rank_in_every_layout(layout, with_experts, tmp_path):
    nproc, changes = EXPERT_LAYOUTS[layout]
    given, (expected_metrics, expected) = with_experts
    metrics, tensors = run(given, tmp_path / "run", nproc, **changes)
    for key in ("loss", "grad_norm", "eval_loss", "expert_load", "expert_load_max", "dead_experts"):
        a, b = ([r[key] for r in records if key in r] for records in (metrics, expected_metrics))
        assert a == (b if "expert" in key else pytest.approx(b, rel=1e-5, abs=0)), key
    same(tensors, expected)


def test_experts_in_bf16_follow_fp32(with_experts, tmp_path):
    given, (expected, _) = with_experts
    metrics, _ = run(given, tmp_path / "run", 2, precision="bf16", expert_parallel=2)
    assert [r["loss"] for r in metrics] == pytest.approx([r["loss"] for r in expected], rel=0.01)


TIED = {"pp2 dp2": (4, {"pipeline_parallel": 2})}
if os.environ.get("RSFT_LONG_TESTS"):
    TIED |= {
        "cp2 pp2": (4, {"context_parallel": 2, "pipeline_parallel": 2}),
        "pp2 vpp3 dp2": (4, {"pipeline_parallel": 2, "virtual_pipeline": 3}),
    }


@pytest.mark.parametrize("layout", TIED)
def test_an_embedding_that_two_stages_share_is_the_same_weight_on_both(layout, inputs, tmp_path):
    tiny_model(tmp_path / "hf", num_hidden_layers=6, tie_word_embeddings=True)
    convert(tmp_path / "hf", tmp_path / "megatron")
    tied, (nproc, changes) = inputs | {"checkpoint": str(tmp_path / "megatron")}, TIED[layout]
    expected_metrics, expected = run(tied, tmp_path / "one")
    metrics, tensors = run(tied, tmp_path / "many", nproc, **changes)
    for key in ("loss", "grad_norm", "eval_loss"):
        a, b = ([r[key] for r in records if key in r] for records in (metrics, expected_metrics))
        assert a == pytest.approx(b, rel=1e-5, abs=0), key
    same(tensors, expected)


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_training_moves_every_weight(inputs, one_rank):
    before, after = all_tensors(inputs["checkpoint"]), one_rank[1]
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []


def test_bf16_follows_fp32_in_one_piece_and_in_four(inputs, one_rank, tmp_path):
    losses = [r["loss"] for r in one_rank[0]]
    four = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}
    for name, nproc, changes in (
        ("one", 1, {}),
        ("four", 4, four),
        ("low", 1, {"moments": "bf16", "gradients": "bf16"}),
    ):
        metrics, _ = run(inputs, tmp_path / name, nproc, precision="bf16", **changes)
        assert [r["loss"] for r in metrics] == pytest.approx(losses, rel=0.01), name


def test_states_of_buckets_with_padding_between_them_are_saved_and_loaded_where_they_belong(inputs, tmp_path):
    _, expected = run(inputs, tmp_path / "one", global_batch_size=6)
    output = tmp_path / "three"
    config = settings(**inputs, output=str(output), train_iters=STEPS, save_interval=2, global_batch_size=6)
    for _ in ("straight", "from the checkpoint before the last"):
        forked.join(forked.start(_train_in_small_buckets, 3, output / "train.log", config), output / "train.log")
        same(all_tensors(newest(output)), expected)
        shutil.rmtree(newest(output))
    assert "resumed from" in (output / "train.log").read_text()


def _train_in_small_buckets(config) -> None:
    ddp = build.DistributedDataParallelConfig
    build.DistributedDataParallelConfig = lambda **given: ddp(**given, bucket_size=1500)  # 3 ranks pad each to 384
    forked.train_as_rank(config)
