"""No weight of a damaged, mixed or hostile checkpoint is used."""

import json
import os
import pickle
import random
import shutil
import tempfile
import traceback
from io import BytesIO
from pathlib import Path

import forked
import pytest
import torch
from support import all_tensors, logit_difference, random_store, settings, tiny_model, tiny_tokenizer
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.lazy_weights import Weights
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.checkpoint.verify import verify_conversion
from rsft_lib.common.artifact import MANIFEST, read_manifest, verify, write_manifest
from rsft_lib.launch import launch, launch_scoring, launch_training

DAMAGES = {"torch_dist": (1000, 100), "legacy": (200, 40)}  # flipped bits, truncations


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    return tmp_path / "megatron"


def score_as_rank(checkpoint, data, output):
    from rsft_lib.evaluation.score import score
    from rsft_lib.model.distributed import ranks

    with ranks():
        score(checkpoint, data, output)


def uses(folder: Path, tmp_path: Path) -> dict:
    """All ways to read a checkpoint, as in notebooks 02, 05, 07 and 08."""
    if not (tmp_path / "store").exists():
        random_store(tmp_path / "store", samples=20)
        tiny_tokenizer(tmp_path / "tokenizer")
    begun = settings(checkpoint=str(folder), data=str(tmp_path / "store"), output=str(tmp_path / "begun"))
    log, scores = tmp_path / "score.log", (str(folder), str(tmp_path / "store"), str(tmp_path / "scores"))
    return {
        "convert": lambda: convert(folder, tmp_path / "again"),
        "export": lambda: export(folder, tmp_path / "tokenizer", tmp_path / "out"),
        "prove": lambda: verify_conversion(tmp_path / "hf", folder, round_trip=False),
        "prove the outputs": lambda: logit_difference(tmp_path / "hf", folder),
        "score": lambda: forked.join(forked.start(score_as_rank, 1, log, *scores), log),
        "begin a training": lambda: forked.train(begun),
    }


def refuses(ways: dict, message: str, tmp_path: Path, monkeypatch) -> None:
    """Check that every way to use a checkpoint refuses it, before a weight is read, and leaves no files."""
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("a weight was used"))
    for name, use in ways.items():
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=message):
            use()
            pytest.fail(f"{name} used it")
    assert not any((tmp_path / name).exists() for name in ("again", "out", "scores"))


# --- damage


def damage(folder: Path, flips: int, cuts: int, seed: int = 0) -> tuple[int, int]:
    """Number of detected bit flips and truncations at random positions of a checkpoint."""
    rng, found = random.Random(seed), [0, 0]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(flips + cuts):
        # Choose half of the files by size, half uniformly, so that small ones are damaged too.
        weights = [path.stat().st_size for path in files] if number % 2 else None
        (path,) = rng.choices(files, weights)
        whole = path.read_bytes()
        if number < flips:
            place = rng.randrange(len(whole))
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        else:
            path.write_bytes(whole[: rng.randrange(len(whole))])
        try:
            any_format.check(folder)
        except (ValueError, FileNotFoundError) as error:
            assert path.name in str(error) or path.name == MANIFEST, f"{path} is not named: {error}"
            found[number >= flips] += 1
        path.write_bytes(whole)
    any_format.check(folder)
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
    refuses(uses(checkpoint, tmp_path), "__0_0.distcp does not match the SHA-256", tmp_path, monkeypatch)


def test_a_half_zeroed_shard_is_refused(checkpoint, tmp_path, monkeypatch):
    path = checkpoint / "__0_0.distcp"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    refuses(uses(checkpoint, tmp_path), "__0_0.distcp does not match the SHA-256", tmp_path, monkeypatch)


def test_an_added_file_is_refused_but_verify_json_is_not(checkpoint, tmp_path, monkeypatch):
    (checkpoint / "verify.json").write_text("{}")
    torch_dist.check(checkpoint)
    (checkpoint / "__1_0.distcp").write_bytes(b"of another run")
    refuses(uses(checkpoint, tmp_path), "__1_0.distcp is not listed", tmp_path, monkeypatch)


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


# --- attacks, each with a valid manifest


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


class Evaluated(Payload):
    def __reduce__(self):
        return eval, (f"open({str(self.mark)!r}, 'w')",)


class Nested(Payload):
    """Bytes that torch unpickles without restriction."""

    def __reduce__(self):
        hidden = tempfile.TemporaryFile()
        torch.save(Payload(self.mark), hidden)
        hidden.seek(0)
        return torch.storage._load_from_bytes, (hidden.read(),)


def named(module: str, name: str) -> bytes:
    """Pickle opcodes that push a module's attribute onto the stack."""
    text = lambda t: b"\x8c" + bytes([len(t)]) + t.encode()  # noqa: E731
    return text(module) + text(name) + b"\x93"


def through_an_allowed_module(mark: Path) -> bytes:
    """`os.system` as an attribute of an attribute of a module that a checkpoint may name."""
    command = f"touch '{mark}'".encode()
    return b"\x80\x04" + named(METADATA, "os.system") + b"\x8c" + bytes([len(command)]) + command + b"\x85R."


METADATA = "torch.distributed.checkpoint.metadata"
SHARED = {  # global objects: the opcodes that push them onto the stack, and a function that returns them
    "a class": (named(METADATA, "Metadata"), lambda: Metadata),
    "a function": (named("torch.serialization", "_get_layout"), lambda: _get_layout),
    "a member of an enum": (
        named(METADATA, "_MEM_FORMAT_ENCODING") + b"K\x00\x85R",
        lambda: torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING(0),
    ),
}  # fmt: skip


def poisoned(checkpoint: Path, shared: str) -> bytes:
    """The metadata, preceded by opcodes that set `poisoned` on a global object."""
    whole, (stack, _) = (checkpoint / ".metadata").read_bytes(), SHARED[shared]
    state = b"N}\x8c\x08poisoned\x88s\x86"  # (None, {"poisoned": True}): attributes, even of what has no dictionary
    return whole[:2] + stack + state + b"b0" + whole[2:]


def metadata_with(checkpoint, extra):
    metadata = torch_dist.read_metadata(checkpoint)
    metadata.planner_data = extra
    return pickle.dumps(metadata)


def with_object(checkpoint, payload):
    """Replace a tensor by an object, which torch's planner unpickles without restriction."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    with (checkpoint / "__0_9.distcp").open("wb") as file:
        torch.save(payload, file)
    metadata = torch_dist.read_metadata(checkpoint)
    name = "decoder.final_layernorm.weight"
    (index,) = (index for index in metadata.storage_data if index.fqn == name)
    del metadata.storage_data[index]
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    size = (checkpoint / "__0_9.distcp").stat().st_size
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("__0_9.distcp", 0, size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_a_tensors_place(checkpoint, payload):
    file = BytesIO()
    torch.save(payload, file)
    metadata = torch_dist.read_metadata(checkpoint)
    info = next(i for index, i in metadata.storage_data.items() if index.fqn == "embedding.word_embeddings.weight")
    info.length = len(file.getvalue())
    with (checkpoint / info.relative_path).open("r+b") as shard:
        shard.seek(info.offset)
        shard.write(file.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def outside_of_the_folder(checkpoint, place):
    metadata = torch_dist.read_metadata(checkpoint)
    next(iter(metadata.storage_data.values())).relative_path = place
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
        lambda c, m: (c / ".metadata").write_bytes(pickle.dumps({"w": 1})), "refused: it contains a dict",
    ),
    "attributes of a class in .metadata": (
        lambda c, m: (c / ".metadata").write_bytes(poisoned(c, "a class")), "refused: it sets attributes of",
    ),
    "a call in common.pt": (lambda c, m: torch.save(Payload(m), c / "common.pt"), "common.pt is refused"),
    "a call in a tensor's place": (
        lambda c, m: in_a_tensors_place(c, Payload(m)), r"distcp at byte \d+ is refused",
    ),
    "a call in an object where a tensor should be": (
        lambda c, m: with_object(c, Payload(m)), "is a BytesStorageMetadata, expected tensors only",
    ),
    "a path out of the folder": (
        lambda c, m: outside_of_the_folder(c, "../hf/model.safetensors"), "refers to '../hf/model.safetensors'",
    ),
    "a path to anywhere": (lambda c, m: outside_of_the_folder(c, "/x/0.distcp"), "refers to '/x/0.distcp'"),
}  # fmt: skip


NO_PLAIN_TENSORS = {"sparse": torch.eye(2).to_sparse(), "of no memory": torch.ones(2, device="meta")}


@pytest.mark.parametrize("kind", NO_PLAIN_TENSORS)
def test_a_tensor_of_another_kind_is_refused_as_damage(kind, checkpoint):
    in_a_tensors_place(checkpoint, NO_PLAIN_TENSORS[kind])
    why = "does not contain a plain tensor .*: it is damaged, or"
    if kind == "sparse":  # later versions of torch do not even read one
        why += "|is refused: .*; do not load this checkpoint"
    with pytest.raises(ValueError, match=rf"distcp at byte \d+ ({why})"):
        torch_dist.open_weights(checkpoint)


def test_a_name_with_a_zero_byte_is_refused(checkpoint):
    outside_of_the_folder(checkpoint, "a\0.distcp")
    with pytest.raises(ValueError, match=r"metadata is refused: it refers to 'a\\x00.distcp'"):
        torch_dist.open_weights(checkpoint)


@pytest.mark.parametrize("payload", [Payload("mark"), torch.nn.Linear(1, 1)], ids=["a call", "a module"])
def test_a_refusal_does_not_advise_how_to_load_the_file_anyway(payload, checkpoint):
    torch.save(payload, checkpoint / "common.pt")
    with pytest.raises(ValueError, match="(?i)common.pt is refused: unsupported global.*; do not load") as refused:
        torch_dist.read_common(checkpoint)
    shown = "".join(traceback.format_exception(refused.value))
    assert "likely succeed" not in shown and "safe_globals" not in shown and "weights_only" not in str(refused.value)


def made_right(checkpoint: Path) -> None:
    """Rewrite the manifest for the current files."""
    facts = {name: fact for name, fact in read_manifest(checkpoint).items() if name not in ("files", "manifest_sha256")}
    write_manifest(checkpoint, facts)
    verify(checkpoint)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_a_converted_checkpoint_is_refused_and_not_executed(attack, checkpoint, tmp_path, monkeypatch):
    harm, message = ATTACKS[attack]
    harm(checkpoint, tmp_path / "it-ran")
    made_right(checkpoint)
    refuses(uses(checkpoint, tmp_path), message, tmp_path, monkeypatch)
    assert not (tmp_path / "it-ran").exists()


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A folder with the inputs of a run, and the run after half of its steps."""
    folder = tmp_path_factory.mktemp("half-way")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "store", samples=20)
    forked.train(the_run(folder))
    shutil.rmtree(newest(folder / "run"))
    return folder


def the_run(folder: Path, **changes):
    place = {"checkpoint": str(folder / "megatron"), "data": str(folder / "store"), "output": str(folder / "run")}
    return settings(**place, train_iters=4, save_interval=2, **changes)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_in_a_runs_checkpoint_is_refused_on_resume_and_not_executed(attack, half_way, tmp_path):
    run = shutil.copytree(half_way / "run", tmp_path / "run")
    harm, message = ATTACKS[attack]
    harm(run / "iter_0000002", tmp_path / "it-ran")
    made_right(run / "iter_0000002")
    given = the_run(half_way).to_json() | {"output": str(run)}
    with pytest.raises(RuntimeError, match=message):
        forked.train(settings(**given))
    assert not (tmp_path / "it-ran").exists() and not (run / "iter_0000004").exists()


def test_an_attack_is_refused_by_the_processes_that_notebooks_launch(half_way, tmp_path):
    given, mark = the_run(half_way).to_json() | {"output": str(tmp_path / "05")}, tmp_path / "it-ran"
    arguments = [f"--model={half_way / 'hf'}", f"--checkpoint={tmp_path / '07' / 'iter_0000002'}", "--no-round-trip"]
    scores = tmp_path / "08" / "iter_0000002", half_way / "store", tmp_path / "scores", 1
    launched = {
        "05": ("a call in an object where a tensor should be", lambda: launch_training(settings(**given), 1)),
        "07": ("a call in .metadata", lambda: launch("rsft_lib.checkpoint.verify", arguments, 1, tmp_path / "log")),
        "08": ("a call in common.pt", lambda: launch_scoring(*scores)),
    }
    for notebook, (attack, start) in launched.items():
        harm, message = ATTACKS[attack]
        checkpoint = shutil.copytree(half_way / "run", tmp_path / notebook) / "iter_0000002"
        harm(checkpoint, mark)
        made_right(checkpoint)
        with pytest.raises(RuntimeError, match=message):
            start()
        assert not mark.exists(), notebook


@pytest.mark.parametrize("shared", SHARED)
def test_a_pickle_cannot_set_attributes_of_shared_objects(shared, checkpoint):
    (checkpoint / ".metadata").write_bytes(poisoned(checkpoint, shared))
    with pytest.raises(ValueError, match="refused: it sets attributes of"):
        torch_dist.read_metadata(checkpoint)
    assert not hasattr(SHARED[shared][1](), "poisoned")


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model_optim_rng.pt"])
def test_an_attack_in_third_party_files_is_refused_and_not_executed(kind, tmp_path):
    tiny_model(tmp_path / "hf")
    mark, folder = tmp_path / "it-ran", tmp_path / "hf"
    if kind == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Payload(mark)}, folder / kind)
    else:
        folder = Path(convert(folder, tmp_path / "legacy", format="legacy")["folder"])
        (folder / MANIFEST).unlink()
        torch.save({"model": {}, "args": Payload(mark)}, folder / "iter_0000001" / "mp_rank_00" / kind)
    with pytest.raises(ValueError, match=f"{kind} is not a complete") as refused:
        convert(folder, tmp_path / "out")
    assert "weights_only" not in "".join(traceback.format_exception(refused.value))  # torch's advice to run it
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_the_attacks_are_real(checkpoint, tmp_path):
    """The payloads refused above run when they are unpickled without restriction."""
    for number, attack in enumerate((Payload, Evaluated, Nested)):
        mark = tmp_path / f"mark{number}"
        try:
            pickle.loads(metadata_with(checkpoint, attack(mark)))
        except pickle.UnpicklingError as error:
            assert attack is Nested and "posix.system" in str(error)  # later versions of torch refuse it themselves
            continue
        assert mark.exists()
    pickle.loads(through_an_allowed_module(tmp_path / "mark9"))
    assert (tmp_path / "mark9").exists()
    for shared, (_, see) in SHARED.items():
        try:
            pickle.loads(poisoned(checkpoint, shared))
            assert see().poisoned
        finally:
            delattr(see(), "poisoned")
