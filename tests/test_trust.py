"""No weight of a damaged, mixed or hostile checkpoint is used: pytest tests/test_trust.py"""

import json
import os
import pickle
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from support import all_tensors, tiny_model, tiny_tokenizer
from torch.distributed.checkpoint.api import CheckpointException

from rsft_lib.artifact import MANIFEST, read_manifest, verify, write_manifest
from rsft_lib.checkpoint import sources, torch_dist
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.pieces import Weights
from rsft_lib.checkpoint.sharded import load, load_weights, sharded_weights
from rsft_lib.model.config import read_config, transformer_config
from rsft_lib.model.gpt import build_model
from rsft_lib.ranks import ranks

DAMAGES = {"torch_dist": (1000, 100), "legacy": (200, 40)}  # flipped bits, truncations


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    return tmp_path / "megatron"


def refuses(folder, tmp_path, monkeypatch, message):
    """Every way to use a checkpoint refuses it, and no weight has been read by then."""
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("a weight was used"))
    config = read_config(tmp_path / "hf")
    uses = {
        "convert": lambda: convert(folder, tmp_path / "again"),
        "export": lambda: export(folder, tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out"),
    }
    with ranks():
        model = build_model(config, transformer_config(config), "torch", 16)
        uses["load_weights"] = lambda: load_weights(model, folder)
        uses["load"] = lambda: (verify(folder), load({"model": sharded_weights(model)}, folder))
        for use in uses.values():
            with pytest.raises((ValueError, FileNotFoundError, CheckpointException), match=message):
                use()
    assert not (tmp_path / "again").exists() and not (tmp_path / "out").exists()


# --- damage


def damage(folder: Path, flips: int, cuts: int, seed: int = 0) -> tuple[int, int]:
    """How many of so many flipped bits, and files cut short, at random places of a checkpoint, are detected."""
    rng, found = random.Random(seed), [0, 0]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(flips + cuts):
        # Half of the damage in files by their size, half in any file: small ones matter no less.
        weights = [path.stat().st_size for path in files] if number % 2 else None
        (path,) = rng.choices(files, weights)
        whole = path.read_bytes()
        if number < flips:
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        else:
            path.write_bytes(whole[: rng.randrange(len(whole))])
        try:
            sources.check(folder)
        except (ValueError, FileNotFoundError) as error:
            assert path.name in str(error) or path.name == MANIFEST, f"{path} is not named: {error}"
            found[number >= flips] += 1
        path.write_bytes(whole)
    sources.check(folder)
    return tuple(found)


@pytest.mark.parametrize("format", DAMAGES)
def test_every_flipped_bit_and_every_truncation_is_detected(format, tmp_path):
    tiny_model(tmp_path / "hf")
    folder = Path(convert(tmp_path / "hf", tmp_path / "megatron", format=format)["folder"])
    assert damage(folder, *DAMAGES[format]) == DAMAGES[format]


def names_of(checkpoint):
    return [*read_manifest(checkpoint)["files"], MANIFEST]


def test_a_checkpoint_that_lacks_any_of_its_files_is_refused(checkpoint):
    for name in names_of(checkpoint):
        path = checkpoint / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            torch_dist.check(checkpoint)
        path.write_bytes(content)
    torch_dist.check(checkpoint)


def test_shards_of_two_steps_are_refused(checkpoint, tmp_path, monkeypatch):
    other = {name: tensor + 1 for name, tensor in all_tensors(checkpoint).items()}
    (tmp_path / "next").mkdir()
    torch_dist.write(tmp_path / "next", Weights.of(other))
    shutil.copyfile(tmp_path / "next" / "__0_0.distcp", checkpoint / "__0_0.distcp")
    refuses(checkpoint, tmp_path, monkeypatch, "__0_0.distcp has not the SHA-256")


def test_a_half_of_a_shard_that_is_zero_is_refused(checkpoint, tmp_path, monkeypatch):
    path = checkpoint / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    refuses(checkpoint, tmp_path, monkeypatch, "__0_0.distcp has not the SHA-256")


def test_a_file_that_was_laid_in_is_refused_but_a_proof_is_not(checkpoint, tmp_path, monkeypatch):
    (checkpoint / "verify.json").write_text("{}")
    torch_dist.check(checkpoint)
    (checkpoint / "__1_0.distcp").write_bytes(b"of another run")
    refuses(checkpoint, tmp_path, monkeypatch, "__1_0.distcp is not listed")


def test_a_manifest_that_was_edited_is_refused(checkpoint):
    path = checkpoint / MANIFEST
    text = path.read_text()
    for edited in (
        text.replace('"parameters"', '"Parameters"'),
        text + " ",
        json.dumps(json.loads(text)),
        text.replace('"manifest_sha256"', '"sha256"'),
        "[]",
    ):
        path.write_text(edited)
        with pytest.raises(ValueError, match="manifest.json is damaged or was edited"):
            verify(checkpoint)


# --- attacks: the manifest is right in each of them, as an attacker would have it


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


class Evaluated(Payload):
    def __reduce__(self):
        return eval, (f"open({str(self.mark)!r}, 'w')",)


class Nested(Payload):
    """Bytes that torch itself unpickles without a restriction."""

    def __reduce__(self):
        hidden = tempfile.TemporaryFile()
        torch.save(Payload(self.mark), hidden)
        hidden.seek(0)
        return torch.storage._load_from_bytes, (hidden.read(),)


def through_an_allowed_module(mark: Path) -> bytes:
    """`os.system` as an attribute of an attribute of a module that a checkpoint may name."""
    name, command = b"torch.distributed.checkpoint.metadata", f"touch '{mark}'".encode()
    text = lambda b: b"\x8c" + bytes([len(b)]) + b  # noqa: E731
    return b"\x80\x04" + text(name) + text(b"os.system") + b"\x93" + text(command) + b"\x85R."


def metadata_with(checkpoint, extra):
    metadata = torch_dist.read_metadata(checkpoint)
    metadata.planner_data = extra
    return pickle.dumps(metadata)


def with_object(checkpoint, payload):
    """An object beside the tensors, which torch's own planner unpickles without a restriction."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    with (checkpoint / "__0_9.distcp").open("wb") as file:
        torch.save(payload, file)
    metadata = torch_dist.read_metadata(checkpoint)
    metadata.state_dict_metadata["decoder.rng"] = BytesStorageMetadata()
    size = (checkpoint / "__0_9.distcp").stat().st_size
    metadata.storage_data[MetadataIndex("decoder.rng")] = _StorageInfo("__0_9.distcp", 0, size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_tensors_place(checkpoint, payload):
    with (checkpoint / "__0_0.distcp").open("r+b") as file:
        torch.save(payload, file)


def outside_of_the_folder(checkpoint, mark):
    metadata = torch_dist.read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = "../hf/model.safetensors"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


ATTACKS = {
    "a call in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(metadata_with(c, Payload(m))), "metadata is refused.*system",
    ),
    "eval in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(metadata_with(c, Evaluated(m))), "refused.*builtins.eval",
    ),
    "torch's own loader in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(metadata_with(c, Nested(m))), "refused.*_load_from_bytes",
    ),
    "an attribute of an allowed module in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(through_an_allowed_module(m)), "refused.*os.system",
    ),
    "something else in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(pickle.dumps({"w": 1})), "refused: it holds a dict",
    ),
    "a call in common.pt": (lambda c, m: torch.save(Payload(m), c / "common.pt"), "common.pt is refused"),
    "a call in a tensor's place": (
        lambda c, m: in_a_tensors_place(c, Payload(m)), "0.distcp at byte 0 is refused|corrupt",
    ),
    "a call in an object beside the tensors": (
        lambda c, m: with_object(c, Payload(m)), "9.distcp at byte 0 is refused",
    ),
    "a path out of the folder": (outside_of_the_folder, "points at '../hf/model.safetensors'"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_and_nothing_of_it_runs(attack, checkpoint, tmp_path, monkeypatch):
    harm, message = ATTACKS[attack]
    mark = tmp_path / "it-ran"
    harm(checkpoint, mark)
    facts = {name: fact for name, fact in read_manifest(checkpoint).items() if name != "files"}
    write_manifest(checkpoint, facts)
    verify(checkpoint)
    refuses(checkpoint, tmp_path, monkeypatch, message)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model_optim_rng.pt"])
def test_an_attack_in_files_of_others_is_refused_and_nothing_of_it_runs(kind, tmp_path):
    tiny_model(tmp_path / "hf")
    mark, folder = tmp_path / "it-ran", tmp_path / "hf"
    if kind == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Payload(mark)}, folder / kind)
    else:
        folder = Path(convert(folder, tmp_path / "legacy", format="legacy")["folder"])
        (folder / MANIFEST).unlink()
        torch.save({"model": {}, "args": Payload(mark)}, folder / "iter_0000001" / "mp_rank_00" / kind)
    with pytest.raises(ValueError, match=f"{kind} is no whole"):
        convert(folder, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_the_attacks_are_real(checkpoint, tmp_path):
    """Loaded as torch does, what is refused above would have run."""
    for number, attack in enumerate((Payload, Evaluated, Nested)):
        mark = tmp_path / f"mark{number}"
        pickle.loads(metadata_with(checkpoint, attack(mark)))
        assert mark.exists()
    pickle.loads(through_an_allowed_module(tmp_path / "mark9"))
    assert (tmp_path / "mark9").exists()
