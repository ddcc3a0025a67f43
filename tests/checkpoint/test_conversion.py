"""Conversion to megatron-core and export to Hugging Face, and what both refuse."""

import errno
import json
import os
import re
import shutil
from collections import namedtuple

import pytest
import torch
from families import FAMILIES, tiny_family
from megatron.core.dist_checkpointing import load_plain_tensors
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config
from safetensors.torch import load_file, save_file
from support import all_tensors, differing_tensors, logit_difference, record_checksums, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rsft_lib.checkpoint import lazy_weights
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.lazy_weights import Weights
from rsft_lib.common import artifact
from rsft_lib.common.artifact import new_folder, read_manifest, verify
from rsft_lib.common.hashing_writer import HashedFile
from rsft_lib.model.distributed import ranks
from rsft_lib.tokenizer.patch import fingerprint


@pytest.fixture
def model(tmp_path):
    tiny_model(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def perturbed(checkpoint, folder):
    """A copy of a checkpoint with noise on every weight, like after a training."""
    noisy = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in all_tensors(checkpoint).items()}
    with new_folder(folder, {"made_by": "train"}) as temporary:
        torch_dist.write(temporary, Weights.of(noisy))
        shutil.copyfile(checkpoint / "config.json", temporary / "config.json")
    return folder


def same_tensors(a, b):
    """Whether two dictionaries have bitwise equal tensors."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_an_export_contains_every_perturbed_tensor_including_biases(model, tokenizer, tmp_path):
    convert(model, tmp_path / "megatron")
    noisy = perturbed(tmp_path / "megatron", tmp_path / "noisy")
    export(noisy, tokenizer, tmp_path / "out")

    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    # Independent of our weight map: transformers with the export has the same outputs as megatron-core with the
    # checkpoint.
    assert logit_difference(tmp_path / "out", noisy) < 1e-4
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    verify(tmp_path / "out")


def test_megatron_core_itself_loads_a_converted_checkpoint(model, tmp_path):
    convert(model, tmp_path / "megatron")
    weights = torch_dist.open_weights(tmp_path / "megatron")
    with ranks():
        loaded = load_plain_tensors(str(tmp_path / "megatron"))
    assert maybe_load_config(str(tmp_path / "megatron")) == CheckpointingConfig("torch_dist")
    assert same_tensors(loaded, {name: weights.read(name) for name in weights})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_preserves_every_bit_and_the_dtype(family, dtype, tokenizer, tmp_path):
    before = tiny_family(tmp_path / "hf", family, dtype)
    convert(tmp_path / "hf", tmp_path / "megatron")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
    assert same_tensors(before.state_dict(), after.state_dict())


def test_blocks_of_weights_and_several_files_change_nothing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_weights, "BLOCK", 1000)
    monkeypatch.setattr(torch_dist, "FILE_SIZE", 100_000)
    convert(model, tmp_path / "megatron")
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3
    assert record_checksums(tmp_path / "megatron") == {0}
    export(tmp_path / "megatron", tokenizer, tmp_path / "out", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    read = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert same_tensors(read, load_file(model / "model.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 256


def test_weights_of_two_dtypes_keep_theirs(model, tokenizer, tmp_path):
    edit_weights(model, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if "mlp" in n}))
    convert(model, tmp_path / "megatron")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    assert same_tensors(load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))


def test_a_requested_dtype_applies_to_every_tensor_and_the_config(model, tokenizer, tmp_path):
    facts = convert(model, tmp_path / "megatron", dtype="bfloat16")
    assert facts["dtype"] == "bfloat16" and {t.dtype for t in all_tensors(tmp_path / "megatron").values()} == {
        torch.bfloat16
    }
    export(tmp_path / "megatron", tokenizer, tmp_path / "out", dtype="float16")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    before = load_file(model / "model.safetensors")
    assert same_tensors(after.state_dict(), {name: tensor.bfloat16().half() for name, tensor in before.items()})


@pytest.mark.parametrize("names", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"], []])
def test_every_dtype_field_of_a_written_config_is_updated(names, model, tokenizer, tmp_path):
    edit_config(model, **dict.fromkeys(["dtype", "torch_dtype"], "float32"))
    content = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in content.items() if key in names or key not in ("dtype", "torch_dtype")}
    (model / "config.json").write_text(json.dumps(kept))
    convert(model, tmp_path / "megatron", dtype="bfloat16")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out", dtype="float16")
    for folder, dtype in (("megatron", "bfloat16"), ("out", "float16")):
        found = json.loads((tmp_path / folder / "config.json").read_text())
        assert found == kept | dict.fromkeys(names or ["dtype"], dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float16


def test_a_converted_config_of_another_dtype_is_written_again(model, tmp_path):
    convert(model, tmp_path / "megatron", dtype="bfloat16")
    right = (tmp_path / "megatron" / "config.json").read_bytes()
    assert right != (model / "config.json").read_bytes()
    shutil.copyfile(model / "config.json", tmp_path / "megatron" / "config.json")
    facts = {k: v for k, v in read_manifest(tmp_path / "megatron").items() if k != "files"}
    artifact.write_manifest(tmp_path / "megatron", facts)  # as written before config.json was changed too
    convert(model, tmp_path / "megatron", dtype="bfloat16")
    assert (tmp_path / "megatron" / "config.json").read_bytes() == right


def test_a_training_in_fp32_is_exported_in_the_dtype_of_the_model(tokenizer, tmp_path):
    tiny_model(tmp_path / "hf", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "megatron")
    with new_folder(tmp_path / "trained", {"made_by": "train"}) as folder:
        long = {name: tensor.float() + 0.1 for name, tensor in all_tensors(tmp_path / "megatron").items()}
        torch_dist.write(folder, Weights.of(long))
        shutil.copyfile(tmp_path / "megatron" / "config.json", folder / "config.json")
    export(tmp_path / "trained", tokenizer, tmp_path / "out")
    export(tmp_path / "trained", tokenizer, tmp_path / "long", dtype="float32")
    short, long = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "long"))
    assert same_tensors(short, {name: tensor.bfloat16() for name, tensor in long.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "long", dtype="auto").dtype == torch.float32


def test_a_value_that_overflows_float16_is_refused_by_name_and_nothing_is_written(model, tokenizer, tmp_path):
    norm = "model.layers.1.input_layernorm.weight"
    for number, fits in ((65504.0, True), (65519.0, True), (65520.0, False), (-1e9, False)):
        edit_weights(model, lambda t, n=number: t[norm].__setitem__(7, n))
        convert(model, tmp_path / "megatron")
        if fits:
            export(tmp_path / "megatron", tokenizer, tmp_path / "fits", dtype="float16")
            assert load_file(tmp_path / "fits" / "model.safetensors")[norm][7] == 65504
            continue
        message = f"{norm}: its largest absolute value, {abs(number):.5g}, overflows torch.float16 (maximum 65504)"
        with pytest.raises(ValueError, match=re.escape(message)):
            export(tmp_path / "megatron", tokenizer, tmp_path / "out", dtype="float16")
        with pytest.raises(ValueError, match="layers.1.*layer_norm_weight: its largest absolute value"):
            convert(model, tmp_path / "half", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits", "hf", "megatron"]


def as_bin(model, sharded):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    if not sharded:
        torch.save(tensors, model / "pytorch_model.bin")
        return
    placed = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if placed[name] == file}, model / file)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))


def as_shards(model):
    """Add shards beside the single file, which transformers would remove."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model / "shards", max_shard_size="100KB")
    for path in (model / "shards").glob("model*"):
        shutil.copyfile(path, model / path.name)
    shutil.rmtree(model / "shards")


SOURCES = {
    "sharded": lambda m: as_shards(m),
    "bin": lambda m: as_bin(m, sharded=False),
    "sharded bin": lambda m: as_bin(m, sharded=True),
    "old bin": lambda m: (
        torch.save(load_file(m / "model.safetensors"), m / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        (m / "model.safetensors").unlink(),
    ),
    "rotary buffers": lambda m: edit_weights(
        m, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_any_kind_of_model_folder_converts_like_one_safetensors_file(source, model, tmp_path):
    convert(model, tmp_path / "a")
    SOURCES[source](model)
    convert(model, tmp_path / "b")
    assert same_tensors(all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"))


STALE = {  # other weight files -> how to add them to a folder with one safetensors file
    "an index and its shards": lambda m: SOURCES["sharded"](m),
    "an index without its shards": lambda m: (
        SOURCES["sharded"](m), [path.unlink() for path in m.glob("model-*.safetensors")],
    ),
    "a .bin": lambda m: torch.save({"old": torch.ones(1)}, m / "pytorch_model.bin"),
    "an index of .bin files": lambda m: (m / "pytorch_model.bin.index.json").write_text("{}"),
}  # fmt: skip


@pytest.mark.parametrize("stale", STALE)
def test_of_several_weight_files_those_of_transformers_are_read(stale, model, tmp_path, capsys):
    weights = model / "model.safetensors"
    before = load_file(weights)
    STALE[stale](model)
    save_file({name: tensor + 1 for name, tensor in before.items()}, weights, metadata={"format": "pt"})
    convert(model, tmp_path / "megatron")
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(expected[name], tensor + 1) for name, tensor in before.items())
    assert differing_tensors(model, tmp_path / "megatron") == []
    found = all_tensors(tmp_path / "megatron")["output_layer.weight"]
    assert torch.equal(found, expected["lm_head.weight"])
    output = capsys.readouterr().out
    assert f"{model}: reading model.safetensors, ignoring " in output and "(the precedence of transformers)" in output


def test_shards_are_read_before_a_bin_file_as_transformers_does(model, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    SOURCES["sharded"](model)
    (model / "model.safetensors").unlink()
    torch.save({"old": torch.ones(1)}, model / "pytorch_model.bin")
    convert(model, tmp_path / "megatron")
    assert same_tensors(AutoModelForCausalLM.from_pretrained(model).state_dict(), expected)
    assert torch.equal(all_tensors(tmp_path / "megatron")["output_layer.weight"], expected["lm_head.weight"])


def test_a_copy_of_a_tied_head_is_ignored_but_a_different_tensor_is_refused(tmp_path):
    model = tmp_path / "hf"
    tiny_model(model, tie_word_embeddings=True)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(model, lambda t: t.update({"lm_head.weight": embedding.clone()}))
    convert(model, tmp_path / "megatron")
    assert "output_layer.weight" not in all_tensors(tmp_path / "megatron")
    edit_weights(model, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="lm_head.weight: config.json ties it to the embedding"):
        convert(model, tmp_path / "other")


# --- what is repeated, and what is not


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def test_a_complete_conversion_is_not_repeated(model, tmp_path, capsys):
    first = convert(model, tmp_path / "megatron")
    before = inodes(tmp_path / "megatron")
    assert convert(model, tmp_path / "megatron") == first
    assert inodes(tmp_path / "megatron") == before and "already exists" in capsys.readouterr().out


def flip_last_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


AGAIN = {
    "the weights changed": lambda m, out: edit_weights(m, lambda t: t["lm_head.weight"][0].zero_()),
    "the config changed": lambda m, out: edit_config(m, max_position_embeddings=77),
    "the output is damaged": lambda m, out: flip_last_bit(next(out.glob("*.distcp"))),
    "the manifest is damaged": lambda m, out: (out / "common.pt").unlink(),
}


@pytest.mark.parametrize("change", AGAIN)
def test_a_conversion_with_another_result_is_repeated(change, model, tmp_path):
    convert(model, tmp_path / "megatron")
    AGAIN[change](model, tmp_path / "megatron")
    before = inodes(tmp_path / "megatron")
    convert(model, tmp_path / "megatron")
    assert inodes(tmp_path / "megatron").items().isdisjoint(before.items())
    convert(model, tmp_path / "fresh")
    assert same_tensors(all_tensors(tmp_path / "megatron"), all_tensors(tmp_path / "fresh"))
    verify(tmp_path / "megatron")


def test_an_export_is_made_again_only_for_another_checkpoint_or_tokenizer(model, tokenizer, tmp_path):
    convert(model, tmp_path / "megatron")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    before = inodes(tmp_path / "out")
    export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    assert inodes(tmp_path / "out") == before
    other = shutil.copytree(tokenizer, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    export(tmp_path / "megatron", other, tmp_path / "out")
    after = inodes(tmp_path / "out")
    assert after != before
    export(perturbed(tmp_path / "megatron", tmp_path / "noisy"), other, tmp_path / "out", overwrite=True)
    assert inodes(tmp_path / "out") != after


# --- rows of the vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_becomes_the_mean_of_others_in_both_embeddings_and_nothing_else_changes(tied, tmp_path):
    before = tiny_model(tmp_path / "hf", torch.bfloat16, tie_word_embeddings=tied).state_dict()
    means = {7: [1, 2, 3], 2: [7, 9], 255: [0]}  # means of the original rows, in any order
    convert(tmp_path / "hf", tmp_path / "megatron", row_means=means)
    after = all_tensors(tmp_path / "megatron")
    for ours, theirs in (("embedding.word_embeddings.weight", "model.embed_tokens.weight"),) + (
        () if tied else (("output_layer.weight", "lm_head.weight"),)
    ):
        expected = before[theirs].clone()
        for row, others in means.items():
            expected[row] = before[theirs][others].float().mean(dim=0).bfloat16()
        assert torch.equal(after[ours], expected)
    convert(tmp_path / "hf", tmp_path / "plain")
    plain = all_tensors(tmp_path / "plain")
    assert {n for n in plain if not torch.equal(plain[n], after[n])} == {n for n in plain if len(plain[n]) == 256}
    assert read_manifest(tmp_path / "megatron")["row_means"] == {"7": [1, 2, 3], "2": [7, 9], "255": [0]}


@pytest.mark.parametrize(("tied", "format"), [(False, "torch_dist"), (True, "torch_dist"), (False, "legacy")])
def test_an_embedding_grows_to_the_tokens_and_a_new_row_is_the_mean_of_all(tmp_path, tied, format):
    before = tiny_model(tmp_path / "hf", torch.bfloat16, tie_word_embeddings=tied).state_dict()
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    facts = convert(tmp_path / "hf", tmp_path / "megatron", tokens=259, row_means={258: [3, 4]}, format=format)
    export(facts["folder"], tokenizer, tmp_path / "exported")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert after.config.vocab_size == 259
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, grown = before[name], after.state_dict()[name]
        assert torch.equal(grown[:256], rows) and torch.equal(grown[256], grown[257])
        assert torch.allclose(grown[256].float(), rows.float().mean(dim=0), atol=1e-3, rtol=1e-2)
        assert torch.equal(grown[258], rows[3:5].float().mean(dim=0).bfloat16())
    ids = torch.arange(40)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()(ids).logits
    found = after.float()(ids).logits
    assert torch.allclose(found[..., :256], expected, atol=1e-5) and found.shape[-1] == 259
    convert(tmp_path / "hf", tmp_path / "same", tokens=256)  # enough rows: nothing grows
    assert json.loads((tmp_path / "same" / "config.json").read_text())["vocab_size"] == 256


def test_other_row_means_convert_again_and_the_same_do_not(model, tmp_path):
    convert(model, tmp_path / "megatron", row_means={5: [1, 2]})
    before = inodes(tmp_path / "megatron")
    convert(model, tmp_path / "megatron", row_means={5: [1, 2]})
    assert inodes(tmp_path / "megatron") == before
    convert(model, tmp_path / "megatron", row_means={5: [1, 3]})
    assert inodes(tmp_path / "megatron") != before


# --- contents of an export


def as_if_trained(converted, final, data):
    settings = {"lr": 1e-5, "seq_length": 512, "data": "/secret/place"}
    facts = {"made_by": "train", "iteration": 250, "config": {"checkpoint": str(converted), **settings}, "data": data}
    with new_folder(final, facts) as folder:
        for name in os.listdir(converted):
            shutil.copyfile(converted / name, folder / name)


def test_an_export_holds_all_that_a_model_folder_needs(model, tokenizer, tmp_path):
    (model / "generation_config.json").unlink()
    convert(model, tmp_path / "megatron")
    as_if_trained(tmp_path / "megatron", tmp_path / "trained", {"manifest_sha256": "abc", **fingerprint(tokenizer)})
    export(tmp_path / "trained", tokenizer, tmp_path / "out")
    listed = {path.name for path in (tmp_path / "out").iterdir()}
    assert listed == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "manifest.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ bos_token }}"
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 2
    card = (tmp_path / "out" / "README.md").read_text()
    head = card.split("---")[1]
    assert "library_name: transformers" in head and "base_model: hf" in head
    assert "| steps | 250 |" in card and "| lr | 1e-05 |" in card and "<short>" in card and "/secret" not in card
    assert "| data_sha256 | abc |" in card


# --- what is refused before anything is written


@pytest.mark.parametrize("name", ["tokenizer_sha256", "template_sha256"])
def test_a_run_is_not_exported_with_another_tokenizer_or_template_than_it_was_trained_with(
    name, model, tokenizer, tmp_path
):
    convert(model, tmp_path / "megatron")
    as_if_trained(tmp_path / "megatron", tmp_path / "trained", fingerprint(tokenizer) | {name: "of another"})
    message = f"{tmp_path}/trained was trained on /secret/place.*, whose {name} differs from"
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "trained", tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_not_exported(tokenizer, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"train_iters": 5}')
    (run / "job.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"{run} has no intact checkpoint: run notebook 05_train"):
        export(run, tokenizer, tmp_path / "out")


def edit_weights(model, edit):
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def edit_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_a_shard(model):
    SOURCES["sharded"](model)
    (model / "model.safetensors").unlink()
    next(model.glob("model-00002-*")).unlink()


def misplace(model):
    SOURCES["sharded"](model)
    (model / "model.safetensors").unlink()
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = next(iter(index["weight_map"].values()))
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


BIAS = "model.layers.1.self_attn.k_proj.bias"
DAMAGE = {
    "a missing tensor": (lambda m: edit_weights(m, lambda t: t.pop(BIAS)), f"{BIAS}: missing"),
    "an unknown tensor": (
        lambda m: edit_weights(m, lambda t: t.update(extra=torch.zeros(1))),
        "extra: not described by config.json",
    ),
    "more layers than the config has": (
        lambda m: edit_config(m, num_hidden_layers=3, layer_types=None),
        r"model.layers.3.input_layernorm.weight: not described by config.json",
    ),
    "a wrong size": (lambda m: edit_config(m, intermediate_size=97), r"shape \(96, 64\), expected \(97, 64\)"),
    "another model's config": (
        lambda m: edit_config(m, model_type="qwen3"), r"q_norm.weight: missing|bias: not described",
    ),
    "8-bit weights": (
        lambda m: edit_weights(m, lambda t: t.update({BIAS: t[BIAS].to(torch.float8_e4m3fn)})),
        "quantized models cannot be read",
    ),
    "a truncated file": (
        lambda m: cut_in_half(m / "model.safetensors"),
        "model.safetensors is not a complete safetensors file .* download it again",
    ),
    "a truncated .bin": (
        lambda m: (as_bin(m, sharded=False), cut_in_half(m / "pytorch_model.bin")),
        "pytorch_model.bin is not a complete file of tensors only",
    ),
    "a missing shard": (lose_a_shard, "model-00002-of-.* is missing but listed in the index"),
    "a tensor missing from its shard": (misplace, "model.norm.weight: not in model-00001"),
    "an index that is not JSON": (
        lambda m: ((m / "model.safetensors.index.json").write_text("{"), (m / "model.safetensors").unlink()),
        "is not an index of tensors",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "no config": (lambda m: (m / "config.json").unlink(), "model config: .*config.json does not exist"),
    "a config that is not JSON": (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read"),
    "another family": (lambda m: edit_config(m, model_type="gpt2"), "config.json: model_type is 'gpt2'"),
    "biases on every projection": (
        lambda m: edit_config(m, model_type="llama", attention_bias=True), "attention_bias is True",
    ),
    "rotary frequencies that depend on the length": (
        lambda m: edit_config(m, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), "rope_type is 'dynamic'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_converted_is_refused_by_name_and_leaves_nothing(damage, model, tmp_path):
    harm, message = DAMAGE[damage]
    harm(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert(model, tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


SETTINGS = {
    "an indivisible TP": (
        {"format": "legacy", "tensor_parallel": 3},
        "num_attention_heads=4 is not divisible by tensor_parallel=3; num_key_value_heads=2 is neither",
    ),
    "an indivisible PP": (
        {"format": "legacy", "pipeline_parallel": 3}, "num_hidden_layers=4 is not divisible by pipeline_parallel=3",
    ),
    "a TP of 0": ({"format": "legacy", "tensor_parallel": 0}, "must be at least 1"),
    "a TP for a format without one": ({"tensor_parallel": 2}, "loads at any size"),
    "an unknown format": ({"format": "zarr"}, "format is 'zarr'; choose one of torch_dist, legacy"),
    "an unknown dtype": ({"dtype": "int8"}, "dtype is 'int8'; choose one of bfloat16"),
    "a row beyond the vocabulary": ({"row_means": {256: [1]}}, r"row_means\[256\]"),
    "a mean of nothing": ({"row_means": {25: []}}, r"row_means\[25\] = \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_that_does_not_fit_is_refused_and_leaves_nothing(case, model, tmp_path):
    settings, message = SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        convert(model, tmp_path / "megatron", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(model, tokenizer, tmp_path, monkeypatch):
    convert(model, tmp_path / "megatron")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**5, 10**5))
    monkeypatch.setattr(lazy_weights.Weights, "blocks", lambda *_: pytest.fail("something is written"))
    for step in (
        lambda: convert(model, tmp_path / "new" / "megatron"),
        lambda: export(tmp_path / "megatron", tokenizer, tmp_path / "new" / "out"),
    ):
        with pytest.raises(OSError, match="needs 0.6 MB, .* has 0.1 MB left") as error:
            step()
        assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_on_the_way_leaves_what_was_there_before(model, tokenizer, tmp_path, monkeypatch):
    convert(model, tmp_path / "megatron")
    before = inodes(tmp_path / "megatron")
    edit_weights(model, lambda t: t["lm_head.weight"].zero_())

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        convert(model, tmp_path / "megatron")
    with pytest.raises(OSError, match="No space left"):
        export(tmp_path / "megatron", tokenizer, tmp_path / "out")
    assert inodes(tmp_path / "megatron") == before
    verify(tmp_path / "megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_something_else_is_never_overwritten(model, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    convert(model, tmp_path / "megatron")
    for step in (
        lambda: convert(model, tmp_path / "mine"),
        lambda: convert(model, model),
        lambda: export(tmp_path / "megatron", tokenizer, tmp_path / "mine"),
        lambda: export(tmp_path / "megatron", tokenizer, tmp_path / "megatron"),
    ):
        with pytest.raises(FileExistsError, match="choose another folder"):
            step()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_model_is_not_exported(model, tokenizer, tmp_path):
    convert(model, tmp_path / "megatron")
    tensors = all_tensors(tmp_path / "megatron")
    with new_folder(tmp_path / "mixed", {"made_by": "convert"}) as folder:
        torch_dist.write(folder, Weights.of(tensors))
        tiny_model(tmp_path / "smaller", num_hidden_layers=2, intermediate_size=32)
        shutil.copyfile(tmp_path / "smaller" / "config.json", folder / "config.json")
    with pytest.raises(ValueError, match="fc1.weight: shape .192, 64., expected .64, 64. from config.json") as error:
        export(tmp_path / "mixed", tokenizer, tmp_path / "out")
    assert "decoder.layers.2.mlp.linear_fc1.weight: not described by config.json" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer, tmp_path):
    tiny_model(tmp_path / "hf", vocab_size=4)
    convert(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(ValueError, match="the model's vocab_size is 4"):
        export(tmp_path / "megatron", tokenizer, tmp_path / "out")
