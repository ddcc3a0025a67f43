"""Into Megatron and back, and what is refused on the way: pytest tests/test_conversion.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import all_tensors, tiny_model
from transformers import AutoModelForCausalLM

from rsft_lib.artifact import new_folder, verify
from rsft_lib.checkpoint import torch_dist
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.verify import logit_difference


@pytest.fixture
def model(tmp_path):
    tiny_model(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def tokenizer(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("not the model's")
    return folder


def perturbed(checkpoint, folder):
    """A copy of a checkpoint with noise on every weight, as if it had been trained."""
    noisy = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in all_tensors(checkpoint).items()}
    with new_folder(folder, {"made_by": "train"}) as temporary:
        torch_dist.write(temporary, {n: t.to("meta") for n, t in noisy.items()}, noisy.__getitem__)
        shutil.copyfile(checkpoint / "config.json", temporary / "config.json")
    return folder


def test_an_export_carries_every_perturbed_tensor_biases_too(model, tokenizer, tmp_path):
    convert(model, tmp_path / "megatron")
    noisy = perturbed(tmp_path / "megatron", tmp_path / "noisy")
    export(noisy, tokenizer, tmp_path / "out")

    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    # Independent of our table of names: transformers, with the export, computes what megatron-core does with the
    # checkpoint it came from.
    assert logit_difference(tmp_path / "out", noisy) < 1e-4
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    verify(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32}])
def test_there_and_back_every_bit_and_the_dtype_stay(dtype, changes, tokenizer, tmp_path):
    before = tiny_model(tmp_path / "hf", dtype, **changes)
    convert(tmp_path / "hf", tmp_path / "megatron")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    for name, tensor in before.state_dict().items():
        assert tensor.dtype == after.state_dict()[name].dtype
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_a_sharded_model_converts_like_a_single_file(model, tmp_path):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    convert(model, tmp_path / "a")
    convert(tmp_path / "sharded", tmp_path / "b")
    a, b = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_weights(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_in_half(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BIAS = "model.layers.1.self_attn.k_proj.bias"
DAMAGE = {
    "a missing tensor": (lambda m: edit_weights(m, lambda t: t.pop(BIAS)), f"{BIAS}: missing"),
    "an unknown tensor": (
        lambda m: edit_weights(m, lambda t: t.update(extra=torch.zeros(1))),
        "extra: not described by config.json",
    ),
    "a wrong size": (lambda m: edit_config(m, intermediate_size=97), r"shape \(96, 64\), config.json says \(97, 64\)"),
    "a truncated file": (cut_in_half, "model.safetensors is no whole safetensors file .* download it again"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "no config": (lambda m: (m / "config.json").unlink(), "model config: .*config.json does not exist"),
    "another family": (lambda m: edit_config(m, model_type="gpt2"), "config.json: "),
    "a sliding window": (lambda m: edit_config(m, use_sliding_window=True), "use_sliding_window is True"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_converted_is_refused_by_name_and_leaves_nothing(damage, model, tmp_path):
    harm, message = DAMAGE[damage]
    harm(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(model, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_damaged_or_unfinished_checkpoint_is_not_exported(model, tokenizer, tmp_path):
    convert(model, tmp_path / "megatron")
    shard = next((tmp_path / "megatron").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{shard.name} has .* bytes"):
        export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    (tmp_path / "megatron" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="was not finished"):
        export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
