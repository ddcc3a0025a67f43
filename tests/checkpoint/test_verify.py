"""Verification of conversions, correct and wrong ones."""

import json
import os
import subprocess
import sys

import pytest
import torch
from families import tiny_family
from safetensors.torch import load_file, save_file
from support import tiny_tokenizer

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.formats import hf
from rsft_lib.checkpoint.lazy_weights import Piece, Weights
from rsft_lib.checkpoint.proofs import require_proofs
from rsft_lib.checkpoint.verify import lost_in_round_trip, verify_conversion
from rsft_lib.display.model.checkpoint_tables import proofs_table, tensors_table

SENTENCE = "one two three two one"


@pytest.fixture
def model(tmp_path):
    tiny_family(tmp_path / "hf", "qwen2")
    tiny_tokenizer(tmp_path / "hf")
    return tmp_path / "hf"


def test_verifying_a_correct_conversion_compares_every_tensor_and_the_outputs(model, tmp_path):
    convert(model, tmp_path / "megatron")
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=8)
    assert report["differing_tensors"] == report["lost_in_round_trip"] == []
    assert report["logit_difference"] < 1e-4
    assert len(report["next_tokens"]) == 5
    for row in report["next_tokens"]:
        assert row["transformers"] == pytest.approx(row["megatron"], abs=1e-4)
    assert report["tokens"]["transformers"] == report["tokens"]["megatron"] and len(report["tokens"]["megatron"]) == 8
    assert "model.layers.*.self_attn.k_proj.bias" in (text := repr(tensors_table(report))) and "4 of 4" in text
    tensors = load_file(model / "model.safetensors")
    assert {row["name"] for row in report["tensors"]} == tensors.keys()
    for row in report["tensors"]:
        tensor = tensors[row["name"]]
        assert (row["shape"], row["dtype"], row["same"]) == (list(tensor.shape), "float32", True)
        assert row["norm"] == pytest.approx(tensor.norm().item(), rel=1e-5)
    assert [proof["passed"] for proof in report["proofs"]] == [True, True, True]
    require_proofs(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_rows_initialised_with_means_are_compared_with_the_means(model, tmp_path):
    convert(model, tmp_path / "megatron", row_means={5: [1, 2], 1: [5, 3]})
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=4)
    assert report["differing_tensors"] == report["lost_in_round_trip"] == [] and report["logit_difference"] < 1e-4


def test_added_rows_are_verified_with_the_rest(model, tmp_path):
    convert(model, tmp_path / "megatron", tokens=260, row_means={258: [5, 3]})
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=4)
    assert report["differing_tensors"] == report["lost_in_round_trip"] == [] and report["logit_difference"] < 1e-4
    assert {row["name"]: row["shape"] for row in report["tensors"]}["lm_head.weight"][0] == 260


def test_a_tensor_that_changed_is_named(model, tmp_path):
    convert(model, tmp_path / "megatron")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.bias"][3] += 1e-7
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=1)
    assert report["differing_tensors"] == ["model.layers.2.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match="bit-identical in both: .* of .* tensors: model.layers.2.self_attn.k_proj"):
        require_proofs(report)


def test_an_export_with_biases_of_the_original_is_detected(model, tmp_path, monkeypatch):
    """A bug of the original, which is invisible with unchanged weights."""
    untrained, real = load_file(model / "model.safetensors"), hf.as_hf

    def forgetful(weights, config):
        pieces = real(weights, config).pieces
        biases = {name: [Piece((0,), untrained[name])] for name in pieces if name.endswith("k_proj.bias")}
        return Weights(pieces | biases, weights.dtype)

    monkeypatch.setattr(hf, "as_hf", forgetful)
    convert(model, tmp_path / "megatron")
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=1)
    assert report["differing_tensors"] == [] and report["logit_difference"] < 1e-4
    assert report["lost_in_round_trip"] == [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in range(4)]


def test_tensors_swapped_in_both_directions_are_detected_by_the_logits(model, tmp_path, monkeypatch):
    real = hf.row_map

    def mixed_up(config):
        swapped = {"gate": "up", "up": "gate"}
        return {
            ours: [row._replace(name=".".join(
                part.replace(part[:-5], swapped.get(part[:-5], part[:-5])) if part.endswith("_proj") else part
                for part in row.name.split("."))) for row in origins]
            for ours, origins in real(config).items()
        }  # fmt: skip

    monkeypatch.setattr(hf, "row_map", mixed_up)
    convert(model, tmp_path / "megatron")
    report = verify_conversion(model, tmp_path / "megatron", SENTENCE, new_tokens=1)
    assert report["differing_tensors"] == report["lost_in_round_trip"] == []
    assert report["logit_difference"] > 0.01
    assert [proof["passed"] for proof in report["proofs"]] == [True, True, False]
    assert proofs_table(report).rows[2][0] == "FAIL"
    with pytest.raises(ValueError, match="same logits: they differ by at most .*; tolerance 1e-03"):
        require_proofs(report)


def test_an_export_is_verified_against_its_checkpoint_in_its_own_dtype(model, tmp_path):
    convert(model, tmp_path / "megatron")
    export(tmp_path / "megatron", model, tmp_path / "out", dtype="bfloat16")
    report = verify_conversion(tmp_path / "out", tmp_path / "megatron", SENTENCE, new_tokens=1, round_trip=False)
    assert report["differing_tensors"] == [] and report["rounded"] == "bfloat16"
    assert report["logit_difference"] < 1e-4  # both have the rounded weights
    assert [(proof["passed"], proof["tolerance"]) for proof in report["proofs"]] == [
        (True, "none"), (True, "1e-03, in fp32"),
    ]  # fmt: skip
    assert {row["dtype"] for row in report["tensors"]} == {"bfloat16"}


def test_the_command_writes_verify_json_into_the_checkpoint_which_stays_valid(model, tmp_path):
    convert(model, tmp_path / "megatron")
    command = [sys.executable, "-m", "rsft_lib.checkpoint.verify"]
    command += ["--model", str(model), "--checkpoint", str(tmp_path / "megatron")]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    report = json.loads((tmp_path / "megatron" / "verify.json").read_text())
    assert report["differing_tensors"] == [] and report["tokens"]
    convert(tmp_path / "megatron", tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_is_lost_in_any_dtype(dtype, tmp_path):
    tiny_family(tmp_path / "hf", "qwen3", dtype)
    tiny_tokenizer(tmp_path / "hf")
    assert lost_in_round_trip(tmp_path / "hf", tmp_path) == []
