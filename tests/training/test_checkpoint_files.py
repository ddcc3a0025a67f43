"""What each rank writes into the files of a checkpoint, and which of them are read again."""

import itertools
import math
import shutil
import time

import forked
import pytest
import torch
from support import all_tensors, random_store, settings, tiny_model, tiny_tokenizer
from torch.distributed.checkpoint import FileSystemReader, load

from rsft_lib.checkpoint import any_format, sharded
from rsft_lib.checkpoint.any_format import OF_A_MODEL
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, last_checkpoint, newest
from rsft_lib.common import artifact
from rsft_lib.training.optimizer_shards import boxes

STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the inputs of a run, and the run on two replicas with checkpoints after 2 and 4 steps."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "store", samples=60)
    forked.train(the_run(folder), 2)
    return folder


def the_run(folder, output="run", **changes):
    given = {"checkpoint": str(folder / "megatron"), "data": str(folder / "store"), "output": str(folder / output)}
    return settings(**given, train_iters=STEPS, save_interval=2, **{"async_save": True, **changes})


def contents(checkpoint) -> dict[str, set[str]]:
    """File -> names of the tensors of which it has a part."""
    files = {}
    for name, parts in torch_dist.stored_parts(checkpoint).items():
        for part in parts:
            files.setdefault(part.info.relative_path, set()).add(name)
    return files


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_every_rank_writes_half_and_no_file_has_both_weights_and_optimizer_states(place):
    checkpoint, written = newest(place / "run"), [0, 0]
    for name, tensors in contents(checkpoint).items():
        assert len({tensor.startswith(OF_A_MODEL) for tensor in tensors}) == 1
        written[int(name.split("_")[2])] += (checkpoint / name).stat().st_size
    assert written[0] == pytest.approx(written[1], rel=0.1)


def test_torch_itself_reads_the_same_tensors(place):
    expected = all_tensors(newest(place / "run"))
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    load(found, storage_reader=FileSystemReader(newest(place / "run")), no_dist=True)
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_saving_in_the_background_changes_nothing(place):
    forked.train(the_run(place, "waiting", async_save=False), 2)
    for step in (2, 4):
        found, expected = (all_tensors(checkpoint_folder(place / run, step)) for run in ("run", "waiting"))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("of_model", [True, False], ids=["weights", "optimizer states"])
def test_an_export_reads_the_files_with_weights_alone(of_model, place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    last = newest(run)
    damaged = [name for name, t in contents(last).items() if next(iter(t)).startswith(OF_A_MODEL) == of_model]
    for name in damaged:
        flip(last / name)
    facts = export(run, tiny_tokenizer(tmp_path / "tokenizer"), tmp_path / "out")
    assert facts["checkpoint"].endswith("iter_0000002" if of_model else "iter_0000004")
    assert str(last_checkpoint(run)) == facts["checkpoint"]
    if of_model:
        with pytest.raises(ValueError, match="does not match the SHA-256"):
            any_format.check(last)
    else:
        any_format.check(last)


@pytest.mark.parametrize("intact_before", [True, False], ids=["steps back", "starts anew"])
def test_damage_that_one_rank_finds_while_all_load_leaves_no_trace(intact_before, place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(checkpoint_folder(run, 4))
    if intact_before:
        shutil.copytree(place / "run" / "iter_0000004", run / "iter_0000004")
    else:
        (run / "metrics.jsonl").unlink()
    (of_second,) = (
        name for name, t in contents(newest(run)).items() if name.startswith("__1_") and "optimizer" in min(t)
    )
    flip(newest(run) / of_second)
    forked.train(the_run(place, output=str(run)), 2)
    log = (run / "train.log").read_text()
    assert f"{of_second} does not match the SHA-256" in log and ("resumed from" in log) == intact_before
    found, expected = all_tensors(newest(run)), all_tensors(newest(place / "run"))
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_no_part_is_opened_before_its_file_is_verified(place, monkeypatch):
    checkpoint, events = newest(place / "run"), []
    expected = all_tensors(checkpoint)
    tensors = {name: sharded.ShardedTensor.from_rank_offsets(name, t.clone().zero_()) for name, t in expected.items()}
    hashed, opened = artifact.file_hash, torch_dist.MappedFiles.open
    # Slow, so that parts which are opened without waiting are opened first.
    monkeypatch.setattr(
        artifact, "file_hash", lambda path: (time.sleep(0.5), hashed(path), events.append(path.name))[1]
    )
    monkeypatch.setattr(
        torch_dist.MappedFiles, "open",
        lambda self, part: (events.append(f"open {part.info.relative_path}"), opened(self, part))[1],
    )  # fmt: skip
    sharded.load(tensors, checkpoint)
    for name in contents(checkpoint):
        assert events.index(name) < events.index(f"open {name}")
    assert all(torch.equal(place.data, expected[name]) for name, place in tensors.items())


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 3, 4)])
def test_boxes_cover_exactly_the_range_of_a_flattened_tensor_in_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, end in itertools.combinations_with_replacement(range(numbers.numel() + 1), 2):
        parts = [
            numbers[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten()
            for box in boxes(shape, start, end)
        ]
        found = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        assert found.tolist() == list(range(start, end))
        assert len(parts) <= 2 * len(shape) - 1
