"""Trainings from all formats, with an indivisible vocabulary size."""

import shutil
from pathlib import Path

import pytest
import support
import torch
from families import tiny_family
from safetensors.torch import load_file
from support import all_tensors, logit_difference, random_store, settings, tiny_tokenizer, trained

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.training.metrics import MetricsWriter
from rsft_lib.training.preflight import preflight

STEPS, VOCAB = 6, 259


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    tiny_family(folder / "hf", "qwen3", tie_word_embeddings=False, vocab_size=VOCAB)
    convert(folder / "hf", folder / "torch_dist")
    convert(folder / "hf", folder / "legacy", format="legacy", tensor_parallel=2)
    random_store(folder / "data")
    return folder


def run(folder: Path, start: str, output: Path, nproc: int = 1, **changes) -> list[dict]:
    config = settings(
        checkpoint=str(folder / start), data=str(folder / "data"), output=str(output),
        train_iters=STEPS, save_interval=STEPS // 2, **changes,
    )  # fmt: skip
    return trained(config, nproc)


@pytest.fixture(scope="module")
def from_hf(folder):
    return run(folder, "hf", folder / "from-hf")


def losses(metrics):
    return [record["loss"] for record in metrics]


def test_a_training_starts_from_a_model_folder_as_from_a_checkpoint_of_two_ranks(folder, from_hf, tmp_path):
    assert losses(run(folder, "legacy_TP2PP1", tmp_path / "run")) == losses(from_hf)
    before, after = all_tensors(folder / "torch_dist"), all_tensors(newest(folder / "from-hf"))
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_padded_vocabulary_resumes_changes_no_loss_and_is_not_exported(folder, from_hf, tmp_path):
    shutil.copytree(folder / "from-hf", tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    MetricsWriter(tmp_path / "run", STEPS // 2)
    resumed = run(folder, "hf", tmp_path / "run", nproc=2, tensor_parallel=2)
    assert "resumed from" in (tmp_path / "run" / "train.log").read_text()
    assert losses(resumed) == pytest.approx(losses(from_hf), rel=1e-5)

    tensors = all_tensors(newest(tmp_path / "run"))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert len(tensors[name]) == VOCAB + 1 and not tensors[name][VOCAB:].any()
    export(newest(tmp_path / "run"), tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    export(newest(folder / "from-hf"), tmp_path / "tokenizer", tmp_path / "expected")
    out, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    for name, tensor in expected.items():
        torch.testing.assert_close(out[name], tensor, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_added_rows_are_trained_and_exported(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(support, "VOCAB", VOCAB + 4)
    random_store(tmp_path / "data", facts={"vocab_size": VOCAB + 4})
    shutil.copytree(folder / "hf", tmp_path / "hf")
    with pytest.raises(ValueError, match="tokenized with 263 tokens, but the model has 259 embedding rows: .* 02"):
        preflight(settings(checkpoint=str(tmp_path / "hf"), data=str(tmp_path / "data"), output=str(tmp_path)), 1)
    convert(tmp_path / "hf", tmp_path / "grown", tokens=VOCAB + 4)
    run(tmp_path, "grown", tmp_path / "run", nproc=2, tensor_parallel=2)
    tiny_tokenizer(tmp_path / "tokenizer")
    export(tmp_path / "run", tmp_path / "tokenizer", tmp_path / "exported")
    rows = load_file(tmp_path / "exported" / "model.safetensors")["model.embed_tokens.weight"]
    mean = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"].mean(dim=0)
    assert len(rows) == VOCAB + 4 and not any(torch.allclose(row, mean, atol=1e-5) for row in rows[VOCAB:])
    assert torch.allclose(rows[VOCAB:], mean, atol=0.05), "a few steps from where they began"
    assert logit_difference(tmp_path / "exported", newest(tmp_path / "run")) < 1e-4
