"""The losses on what is not trained are transformers', over exactly those samples.

The model is that of the last checkpoint, exported, and each sample goes through it by itself.
"""

from collections.abc import Sequence
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from support import random_store, settings, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.data.store import TokenStore
from rsft_lib.training.metrics import read_metrics, scan_metrics

STEPS, SAMPLES = 12, 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", SAMPLES)
    random_store(folder / "held-out", samples=23, seed=1)
    random_store(folder / "others", samples=9, seed=2)
    tiny_tokenizer(folder / "tokenizer")
    return folder


@torch.no_grad()
def by_transformers(model, store: TokenStore, samples: Sequence[int], normalize_by: str) -> float:
    """The loss over some samples, evaluated one by one."""
    total = weight = 0.0
    for tokens, mask in (store[number] for number in samples):
        ids, trained = torch.from_numpy(tokens).long(), torch.from_numpy(mask[1:]) > 0
        losses = cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")[trained].double()
        total += float(losses.mean() if normalize_by == "sample" else losses.sum())
        weight += 1 if normalize_by == "sample" else len(losses)
    return total / weight


CASES = {
    "a folder": (1, {}),
    "a folder, on two replicas of two stages": (4, {"pipeline_parallel": 2}),
    "a folder, each sample alone": (2, {"packing": False, "micro_batch_size": 2}),
    "a folder, by sample": (2, {"normalize_by": "sample"}),
    "a split": (2, {"split": "6,2,2"}),
    "a split by sample": (1, {"split": "50,7,3", "normalize_by": "sample"}),
}
PARTS = {"6,2,2": (range(36), range(36, 48), range(48, 60)), "50,7,3": (range(50), range(50, 57), range(57, 60))}


@pytest.mark.parametrize("case", CASES)
def test_held_out_and_test_loss_are_those_of_transformers_over_exactly_the_samples_that_are_not_trained(
    case, inputs, tmp_path
):
    nproc, changes = CASES[case]
    place = {"checkpoint": str(inputs / "megatron"), "data": str(inputs / "train"), "output": str(tmp_path / "run")}
    held_out = {} if "split" in changes else {"eval_data": str(inputs / "held-out")}
    length = {"train_iters": STEPS, "eval_interval": STEPS, "eval_iters": 99, "lr": 5e-3}
    forked.train(settings(**place, **held_out, **length, **changes), nproc)
    last = read_metrics(tmp_path / "run")[-1]

    export(newest(tmp_path / "run"), inputs / "tokenizer", tmp_path / "out")
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    of_all, others = TokenStore(inputs / "train"), TokenStore(inputs / "held-out")
    trained, evaluated, tested = PARTS.get(changes.get("split"), (range(SAMPLES), range(len(others)), None))
    store, how = others if held_out else of_all, changes.get("normalize_by", "token")
    assert last["eval_loss"] == pytest.approx(by_transformers(model, store, evaluated, how), rel=1e-5)
    assert ("test_loss" in last) == (tested is not None)
    if tested:
        assert last["test_loss"] == pytest.approx(by_transformers(model, store, tested, how), rel=1e-5)
    # What is trained has another loss by now, so that nothing could be taken for the other.
    of_trained = by_transformers(model, of_all, trained, how)
    assert all(last[name] != pytest.approx(of_trained, rel=1e-3) for name in ("eval_loss", "test_loss") if name in last)


LAYOUTS = {"one rank": (1, {}), "two replicas of two stages": (4, {"pipeline_parallel": 2})}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_held_out_set_has_a_loss_of_its_own_also_before_the_first_step_of_a_new_run(layout, inputs, tmp_path):
    (nproc, changes), run = LAYOUTS[layout], tmp_path / "run"
    sets = {"eval_loss": inputs / "held-out", "eval_others_loss": inputs / "others", "eval_same_loss": inputs / "train"}
    more = ", ".join(f"{name.split('_')[1]} -> {folder}" for name, folder in list(sets.items())[1:])
    place = {"checkpoint": str(inputs / "megatron"), "data": str(inputs / "train"), "output": str(run)}
    given = {"eval_data": str(inputs / "held-out"), "eval_more": more, "eval_interval": 2, "eval_iters": 99, "lr": 5e-3}
    forked.train(settings(**place, **given, train_iters=4, lr_schedule="constant", **changes), nproc)
    found = scan_metrics(run)
    assert [record["iteration"] for record in found.records if "eval_others_loss" in record] == [2, 4]

    export(newest(run), inputs / "tokenizer", tmp_path / "out")
    for folder, record in ((inputs / "hf", found.start), (tmp_path / "out", found.records[-1])):
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, data in sets.items():
            store = TokenStore(data)
            assert record[name] == pytest.approx(by_transformers(model, store, range(len(store)), "token"), rel=1e-5)
    assert found.start["iteration"] == 0 and "loss" not in found.start and not found.problems

    forked.train(settings(**place, **given, train_iters=5, lr_schedule="constant", **changes), nproc)
    resumed = scan_metrics(run)
    assert (resumed.start, resumed.records[:4]) == (found.start, found.records)
    assert "before the first step" not in (run / "train.log").read_text()


def test_an_evaluation_of_a_few_batches_is_of_samples_that_are_not_trained_and_the_same_every_time(inputs, tmp_path):
    place = {"checkpoint": str(inputs / "megatron"), "data": str(inputs / "train"), "output": str(tmp_path / "run")}
    still = {"train_iters": 3, "eval_interval": 1, "eval_iters": 2, "lr": 0.0, "min_lr": 0.0, "weight_decay": 0.0}
    forked.train(settings(**place, **still, eval_data=str(inputs / "held-out"), packing=False), 2)
    losses = [record["eval_loss"] for record in read_metrics(tmp_path / "run")]
    assert losses == losses[:1] * 3
    model, others = (
        Qwen2ForCausalLM.from_pretrained(inputs / "hf", dtype=torch.float32),
        TokenStore(inputs / "held-out"),
    )
    first = (
        np.random.default_rng([1234, 0]).permutation(len(others))[:8].tolist()
    )  # two batches of four, in random order
    assert losses[0] == pytest.approx(by_transformers(model, others, first, "token"), rel=1e-5)
