"""Megatron-LM's older layout, written by Megatron-LM and by this kit.

test_families.py checks that our files have the names and shapes of megatron-core's models.
"""

import argparse
import os
import random
import shutil

import numpy
import pytest
import torch
from families import tiny_family
from megatron.core.transformer.enums import AttnBackend
from safetensors.torch import load_file
from support import all_tensors, tiny_tokenizer

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.model.config import check_layout, read_config

FILE = "model_optim_rng.pt"


@pytest.fixture
def model(tmp_path):
    tiny_family(tmp_path / "hf", "qwen2")
    return tmp_path / "hf"


def by_megatron_lm(model, folder, tokens, local=False, **layout):
    """A checkpoint as Megatron-LM writes it: without manifest and config.json, and with more in every file."""
    made = convert(model, folder / "made", format="legacy", vocab_size=tokens, **layout)["folder"]
    shutil.copytree(made, folder / "theirs")
    for name in ("manifest.json", "config.json", "generation_config.json"):
        (folder / "theirs" / name).unlink()
    for path in (folder / "theirs").rglob(FILE):
        content = torch.load(path, weights_only=True)
        content["args"] = argparse.Namespace(num_layers=4, params_dtype=torch.bfloat16, attention=AttnBackend.auto)
        content["rng_state"] = [{"random_rng_state": random.getstate(), "np_rng_state": numpy.random.get_state()}]
        content["optimizer"] = {"optimizer": {"param_groups": [{"lr": 1e-5}]}}
        if local:
            content["model"] = {local_name(name): tensor for name, tensor in content["model"].items()}
        torch.save(content, path)
    return folder / "theirs"


def local_name(name):
    """The name in a model without Transformer Engine."""
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    return name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")


@pytest.mark.parametrize("local", [False, True], ids=["te", "local"])
@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "pipeline_parallel": 4}])
def test_a_checkpoint_that_megatron_lm_wrote_is_exported_with_the_original_vocabulary(model, layout, local, tmp_path):
    # 40 tokens: Megatron-LM pads to 128 x TP rows, of which the model has 251.
    theirs = by_megatron_lm(model, tmp_path, 40, local, **layout)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(FileNotFoundError, match="config.json"):
        export(theirs, tokenizer, tmp_path / "out")
    export(theirs, tokenizer, tmp_path / "out", original=model)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_checkpoint_that_megatron_lm_wrote_becomes_one_of_ours(model, tmp_path):
    theirs = by_megatron_lm(model, tmp_path, 40, tensor_parallel=1, pipeline_parallel=2)
    convert(model, tmp_path / "a")
    convert(theirs, tmp_path / "b", original=model)
    convert(theirs / "iter_0000001", tmp_path / "c", original=model)
    a, b, c = (all_tensors(tmp_path / name) for name in "abc")
    assert a.keys() == b.keys() == c.keys()
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)


def test_dropped_rows_are_not_invented(model, tmp_path):
    made = convert(model, tmp_path / "made", format="legacy", vocab_size=100)["folder"]
    assert len(load_rank(made, 0)["model"]["embedding.word_embeddings.weight"]) == 128
    with pytest.raises(ValueError, match="has 128 vocabulary rows, but vocab_size in config.json is 251"):
        export(made, tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokens", "tensor_parallel", "rows"), [(0, 1, 256), (0, 4, 512), (251, 2, 256), (100, 1, 128)]
)
def test_the_vocabulary_is_padded_as_megatron_lm_does(model, tokens, tensor_parallel, rows, tmp_path):
    facts = convert(model, tmp_path / "made", format="legacy", vocab_size=tokens, tensor_parallel=tensor_parallel)
    parts = [load_rank(facts["folder"], r)["model"]["output_layer.weight"] for r in range(tensor_parallel)]
    assert facts["vocabulary_rows"] == rows and [len(part) for part in parts] == [rows // tensor_parallel] * len(parts)
    head, stored = torch.cat(parts), load_file(model / "model.safetensors")["lm_head.weight"]
    kept = min(rows, 251)
    assert torch.equal(head[:kept], stored[:kept]) and not head[kept:].any()


def load_rank(folder, tp_rank):
    return torch.load(f"{folder}/iter_0000001/mp_rank_{tp_rank:02d}/{FILE}", weights_only=True)


def rank_file(folder, name):
    return folder / "iter_0000001" / name / FILE


def edit(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


NORM = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
DAMAGE = {
    "a rank is missing": (lambda f: shutil.rmtree(f / "iter_0000001" / "mp_rank_01_000"), "mp_rank_01_000/.* missing"),
    "a file is missing": (lambda f: rank_file(f, "mp_rank_00_001").unlink(), "mp_rank_00_001/.* missing"),
    "a file is cut": (lambda f: cut(rank_file(f, "mp_rank_01_001")), "mp_rank_01_001/.* is not a complete, safe"),
    "files of two steps": (
        lambda f: edit(rank_file(f, "mp_rank_00_001"), lambda c: c.update(iteration=2)),
        "mixes files of several steps",
    ),
    "files of two steps without their numbers": (
        lambda f: edit(rank_file(f, "mp_rank_01_000"), lambda c: c["model"][NORM].add_(1)),
        f"{NORM} differs from the files of other ranks",
    ),
    "a weight is missing": (
        lambda f: edit(rank_file(f, "mp_rank_00_000"), lambda c: c["model"].pop(NORM)), f"{NORM}: missing",
    ),
    "a weight is unknown": (
        lambda f: edit(rank_file(f, "mp_rank_00_000"), lambda c: c["model"].update(bias=torch.ones(1))),
        "bias: not described by config.json",
    ),
    "a weight has another size": (
        lambda f: [edit(path, lambda c: c["model"].update({NORM: torch.ones(3)})) for path in f.rglob(FILE)
                   if path.parent.name.endswith("_000")],
        r"layer_norm_weight: shape \(3,\), expected \(64,\) from config.json",
    ),
    "parts of experts": (
        lambda f: os.rename(f / "iter_0000001" / "mp_rank_00_000", f / "iter_0000001" / "mp_rank_00_000_000"),
        "mp_rank_00_000_000: expected mp_rank_XX",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_of_megatron_lm_is_refused_by_name(damage, model, tmp_path):
    theirs = by_megatron_lm(model, tmp_path, 251, tensor_parallel=2, pipeline_parallel=2)
    harm, message = DAMAGE[damage]
    harm(theirs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(theirs, tmp_path / "ours", original=model)
    assert not (tmp_path / "ours").exists()


def test_an_indivisible_qkv_weight_is_refused_and_not_truncated(tmp_path):
    """megatron-core splits its 160 rows evenly; the heads alone would be divisible."""
    shape = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 96}
    tiny_family(tmp_path / "hf", "qwen2", **shape, head_dim=16)
    layout = {"format": "legacy", "tensor_parallel": 6}
    with pytest.raises(ValueError, match="the 160 rows of the fused QKV weight are not divisible by tensor_parallel=6"):
        convert(tmp_path / "hf", tmp_path / "made", **layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    with pytest.raises(ValueError, match="the 160 rows of the fused QKV weight"):
        check_layout(read_config(tmp_path / "hf"), tensor_parallel=6, pipeline_parallel=1)
    # 192 rows are divisible.
    tiny_family(tmp_path / "hf", "qwen2", **shape | {"num_attention_heads": 12, "num_key_value_heads": 6}, head_dim=8)
    made = convert(tmp_path / "hf", tmp_path / "made", **layout)["folder"]
    convert(made, tmp_path / "back", original=tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "straight")
    back, straight = all_tensors(tmp_path / "back"), all_tensors(tmp_path / "straight")
    assert all(torch.equal(back[name], straight[name]) for name in straight)
