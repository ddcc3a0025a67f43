"""Runs that were stopped, killed or damaged, compared with an uninterrupted one."""

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import forked
import killing
import nfs
import pytest
import torch
from families import tiny_family
from support import VOCAB, all_tensors, random_store, settings, tiny_model

from rsft_lib import launch
from rsft_lib.checkpoint.any_format import identity
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.run_checkpoints import checkpoints, newest
from rsft_lib.common import artifact
from rsft_lib.common.artifact import MANIFEST, new_folder
from rsft_lib.common.hashing_writer import HashedFile
from rsft_lib.common.locks import locked
from rsft_lib.launch.local import LocalJob
from rsft_lib.model.config import read_config
from rsft_lib.training.best import chosen_checkpoint
from rsft_lib.training.metrics import MetricsWriter, read_metrics
from rsft_lib.training.preflight import checkpoint_bytes
from rsft_lib.training.retention import remove_leftovers, remove_old
from rsft_lib.training.run_folder import read_ended

STEPS = 4
EXACT = ("iteration", "loss", "grad_norm", "eval_loss", "lr", "trained_tokens", "samples_sha256", "epoch")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", samples=60)
    random_store(folder / "heldout", samples=20, seed=1)
    return {
        "checkpoint": str(folder / "megatron"), "data": str(folder / "train"), "eval_data": str(folder / "heldout"),
    }  # fmt: skip


def run(inputs: dict, output: Path, nproc: int = 1, **changes) -> list[dict]:
    given = {"train_iters": STEPS, "save_interval": STEPS // 2, "eval_interval": 2, **inputs, **changes}
    forked.train(settings(output=str(output), **given), nproc)
    return read_metrics(output)


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight") / "run"
    return output, run(inputs, output)


def stopped_half_way(run_folder: Path, copy: Path) -> Path:
    """A copy of a run as if it had been killed one step after the middle checkpoint."""
    shutil.copytree(run_folder, copy)
    shutil.rmtree(newest(copy))
    MetricsWriter(copy, STEPS - 1)
    return copy


def same(found: list[dict], expected: list[dict], tolerance: float = 0.0) -> None:
    for key in EXACT:
        a, b = ([r[key] for r in records if key in r] for records in (found, expected))
        assert a == (b if key == "samples_sha256" else pytest.approx(b, rel=tolerance, abs=0)), key


def test_a_resumed_run_matches_an_uninterrupted_one_bit_for_bit(inputs, straight, tmp_path):
    output = stopped_half_way(straight[0], tmp_path / "run")
    same(run(inputs, output), straight[1])
    assert f"resumed from {output / 'iter_0000002'}" in (output / "train.log").read_text()
    resumed, whole = all_tensors(newest(output)), all_tensors(newest(straight[0]))
    assert [name for name, tensor in resumed.items() if not torch.equal(tensor, whole[name])] == []


@pytest.mark.parametrize("changes", [{}, {"moments": "bf16", "gradients": "bf16"}], ids=["bf16", "all of it bf16"])
def test_bf16_resumes_bit_for_bit(inputs, tmp_path, changes):
    whole = run(inputs, tmp_path / "whole", precision="bf16", **changes)
    again = stopped_half_way(tmp_path / "whole", tmp_path / "again")
    same(run(inputs, again, precision="bf16", **changes), whole)
    found, expected = all_tensors(newest(again)), all_tensors(newest(tmp_path / "whole"))
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    moment = torch.bfloat16 if changes else torch.float32
    states = {".param.": torch.float32, ".exp_avg.": moment, ".exp_avg_sq.": moment}
    dtypes = {part: {t.dtype for name, t in found.items() if part in name} for part in states}
    assert dtypes == {part: {dtype} for part, dtype in states.items()}
    listed = torch_dist.read_metadata(newest(again)).state_dict_metadata
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: listed[name].properties.dtype for name in found
    }
    config = settings(**inputs, output="o", precision="bf16", **changes)
    expected_bytes = checkpoint_bytes(config, read_config(newest(again)))
    assert sum(tensor.nbytes for tensor in found.values()) == pytest.approx(expected_bytes, rel=0.01)


FOUR = {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "virtual_pipeline": 2}
CHANGES_OF_LAYOUT = {
    "one to four": ((1, {}), (4, FOUR)),
    "four to one": ((4, FOUR), (1, {})),
    "data to context": ((2, {}), (2, {"context_parallel": 2})),
    "pipeline to tensor": ((2, {"pipeline_parallel": 2}), (2, {"tensor_parallel": 2})),
}


@pytest.mark.parametrize("change", CHANGES_OF_LAYOUT)
def test_a_run_resumes_in_another_layout_with_the_samples_in_the_same_order(change, inputs, straight, tmp_path):
    (before, layout), (after, other) = CHANGES_OF_LAYOUT[change]
    run(inputs, tmp_path / "whole", before, **layout)
    found = run(inputs, stopped_half_way(tmp_path / "whole", tmp_path / "run"), after, **other)
    same(found, straight[1], tolerance=1e-5)
    tensors, expected = all_tensors(newest(tmp_path / "run")), all_tensors(newest(straight[0]))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


EXPERTS = {
    "as before": ((1, {}), (1, {})),
    "two to two, bf16": (
        (2, {"expert_parallel": 2, "precision": "bf16"}),
        (2, {"expert_parallel": 2, "precision": "bf16"}),
    ),
    "two to two, router frozen": ((2, {"expert_parallel": 2}), (2, {"expert_parallel": 2})),
    "one to expert-parallel": ((1, {}), (2, {"expert_parallel": 2})),
    "expert-parallel to tensor, pipeline": (
        (2, {"expert_parallel": 2}),
        (4, {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2}),
    ),
}


@pytest.mark.parametrize("change", EXPERTS)
def test_a_model_with_experts_resumes_at_any_expert_parallel_size(change, inputs, tmp_path):
    tiny_family(tmp_path / "hf", "qwen3_moe", vocab_size=VOCAB)
    convert(tmp_path / "hf", tmp_path / "megatron")
    given = {"checkpoint": str(tmp_path / "megatron"), "freeze_router": "frozen" in change}
    (before, layout), (after, other) = EXPERTS[change]
    whole = run(inputs | given, tmp_path / "whole", before, **layout)
    again = stopped_half_way(tmp_path / "whole", tmp_path / "again")
    exact = layout == other
    same(run(inputs | given, again, after, **other), whole, tolerance=0.0 if exact else 1e-5)
    start, found, expected = (
        all_tensors(f) for f in (tmp_path / "megatron", newest(again), newest(tmp_path / "whole"))
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if exact:
            assert torch.equal(tensor, expected[name]), name
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    unchanged = {name for name, tensor in start.items() if (tensor == found[name]).all()}
    assert unchanged == {name for name in start if given["freeze_router"] and ".router." in name}


def test_a_damaged_checkpoint_is_skipped_and_reported(inputs, straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight[0], output)
    shard = next(newest(output).glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    same(run(inputs, output), straight[1])
    log = (output / "train.log").read_text()
    assert f"skipping a checkpoint: {shard}" in log and "resumed from" in log


def test_a_finished_run_is_recognized(inputs, straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight[0], output)
    before = (output / "metrics.jsonl").read_bytes()
    run(inputs, output)
    assert (output / "metrics.jsonl").read_bytes() == before
    assert read_ended(output) == {"reason": "finished", "iteration": STEPS}


def test_a_run_is_not_continued_with_other_settings_or_other_data(inputs, straight, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(straight[0], output)
    with pytest.raises(RuntimeError, match=r"belongs to another run:\n +lr: was 0.001, now 0.002\n +seed: was 1234"):
        run(inputs, output, lr=2e-3, seed=2)
    with pytest.raises(RuntimeError, match="global_batch_size: was 4, now 8"):
        run(inputs, output, global_batch_size=8)
    other = random_store(tmp_path / "other", samples=61, facts={"tokenizer_sha256": "0f"})
    with pytest.raises(RuntimeError) as error:
        run(inputs | {"data": str(other), "eval_data": str(other)}, output)
    assert "data: tokenizer_sha256: was None, now '0f'" in str(error.value)
    assert "data: manifest_sha256: was '" in str(error.value)
    with pytest.raises(RuntimeError, match="train_iters: was 4, now 3; it may only grow"):
        run(inputs, output, train_iters=STEPS - 1)
    base = shutil.copytree(inputs["checkpoint"], tmp_path / "other-base")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(content | {"rope_theta": 7}))
    (base / MANIFEST).unlink()
    with pytest.raises(RuntimeError, match=f"checkpoint: was '.*', now '{base}'; SHA-256 of the weights was"):
        run(inputs | {"checkpoint": str(base)}, output)
    assert len(read_metrics(output)) == STEPS


def test_a_run_resumes_with_a_moved_base_and_smaller_micro_batches_and_logs_the_changes(inputs, tmp_path):
    run(inputs, tmp_path / "whole", micro_batch_size=2)
    output = stopped_half_way(tmp_path / "whole", tmp_path / "run")
    moved = shutil.copytree(inputs["checkpoint"], tmp_path / "moved")
    changed = {"checkpoint": str(moved), "data": str(shutil.copytree(inputs["data"], tmp_path / "data"))}
    same(run(inputs | changed, output), read_metrics(tmp_path / "whole"), tolerance=1e-5)
    log = (output / "train.log").read_text()
    assert "resumed from" in log and "  micro_batch_size: was 2, now 1\n" in log
    assert f"  checkpoint: was '{inputs['checkpoint']}', now '{moved}'\n" in log


def test_the_identity_of_a_base_depends_on_its_weights_only(inputs, tmp_path):
    base = Path(inputs["checkpoint"])
    convert(base.parent / "hf", tmp_path / "made-again")
    copy = shutil.copytree(base, tmp_path / "without-manifest")
    (copy / MANIFEST).unlink()
    assert identity(base) == identity(tmp_path / "made-again") == identity(copy)
    assert identity(base.parent / "hf") != identity(base)
    shard = next(copy.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert identity(copy) != identity(base)


def test_a_finished_run_goes_on_where_more_steps_are_asked_for_on_the_schedule_of_the_longer_run(
    inputs, straight, tmp_path
):
    longer, output, again = (tmp_path / name for name in ("longer", "run", "again"))
    at_once = run(inputs, longer, train_iters=2 * STEPS)
    shutil.copytree(straight[0], output)
    found = run(inputs, output, train_iters=2 * STEPS)
    same(found[:STEPS], straight[1])
    for key in ("iteration", "lr", "samples_sha256", "trained_tokens", "epoch"):
        assert [r[key] for r in found[STEPS:]] == [r[key] for r in at_once[STEPS:]], key
    assert found[STEPS]["lr"] > 2 * straight[1][-1]["lr"] and found[-1]["lr"] == at_once[-1]["lr"]
    assert read_ended(output) == {"reason": "finished", "iteration": 2 * STEPS} and steps(output) == [2, 4, 6, 8]
    log = (output / "train.log").read_text()
    assert f": next step 5, learning rate {found[STEPS]['lr']:.2e}\n" in log
    assert "  train_iters: was 4, now 8; the learning-rate schedule is recomputed for the new length\n" in log
    shutil.copytree(output, again)
    shutil.rmtree(newest(again))
    same(run(inputs, again, train_iters=2 * STEPS), found)  # it also resumes bit for bit


def test_a_checkpoint_written_while_training_goes_on_is_that_of_its_step(inputs, straight, tmp_path):
    same(run(inputs, tmp_path / "run", async_save=True, save_interval=1), straight[1])
    for step in (2, 4):
        found, expected = (all_tensors(folder / f"iter_000000{step}") for folder in (tmp_path / "run", straight[0]))
        assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


# --- which folders are checkpoints, and which are kept


def empty_checkpoint(run: Path, step: int) -> None:
    with new_folder(run / f"iter_{step:07d}", {"made_by": "train", "iteration": step}):
        pass


def steps(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoints(run)]


def test_the_last_checkpoints_and_every_tenth_are_kept(tmp_path):
    for step in (5, 10, 15, 20, 25, 30, 12_345_678):
        empty_checkpoint(tmp_path, step)
    remove_old(tmp_path, 12_345_678, keep_last=0, keep_every=0)
    assert steps(tmp_path) == [5, 10, 15, 20, 25, 30, 12_345_678]
    remove_old(tmp_path, 12_345_678, keep_last=2, keep_every=10)
    assert steps(tmp_path) == [10, 20, 30, 12_345_678] and not list(tmp_path.glob(".iter_*"))


def test_checkpoints_after_the_newest_step_which_are_damaged_push_no_good_one_out(tmp_path):
    for step in (1, 2, 3, 4):
        empty_checkpoint(tmp_path, step)
    remove_old(tmp_path, 2, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [2, 3, 4]


def test_a_run_that_was_killed_between_its_last_save_and_the_removal_of_older_ones_removes_them_when_run_again(
    inputs, straight, tmp_path
):
    output = shutil.copytree(straight[0], tmp_path / "run")
    assert steps(output) == [STEPS // 2, STEPS]
    same(run(inputs, output, keep_last=1), straight[1])
    assert steps(output) == [STEPS]


@pytest.mark.parametrize(
    ("metric", "kept"),
    [("eval_loss", [3, 6]), ("choice_accuracy", [4, 6]), ("eval_math_loss", [2, 6]), ("test_loss", [6]), ("", [6])],
)
def test_the_best_checkpoint_is_kept_besides_the_last(tmp_path, metric, kept):
    losses, shares = (5.0, 4.0, 1.0, 2.0, 1.0, 3.0), (0.0, 0.25, 0.5, 0.75, 0.75, 0.5)
    writer = MetricsWriter(tmp_path, 0)
    writer.write(iteration=0, eval_loss=0.5, choice_accuracy=1.0)  # of no checkpoint
    for step, (loss, share) in enumerate(zip(losses, shares, strict=True), start=1):
        more = {"eval_math_loss": 0.5} if step == 2 else {}
        writer.write(iteration=step, loss=0.1, eval_loss=loss, choice_accuracy=share, **more)
        empty_checkpoint(tmp_path, step)
        remove_old(tmp_path, step, keep_last=1, keep_every=0, keep_best=metric)
    assert steps(tmp_path) == kept


def test_a_run_keeps_its_best_checkpoint_through_a_resume_and_exports_it_by_name(inputs, tmp_path):
    given = {"eval_interval": 1, "save_interval": 1, "lr_schedule": "constant", "warmup_fraction": 0.0, "lr": 2e-2}
    everything = run(inputs, tmp_path / "all", **given)
    losses = {record["iteration"]: record["eval_loss"] for record in everything}
    best = min(losses, key=losses.__getitem__)
    assert best < STEPS, "the best should not be the last one"
    for train_iters in (best + 1, STEPS):  # the second one resumes
        run(inputs, tmp_path / "run", **given, keep_last=1, keep_best="eval_loss", train_iters=train_iters)
        assert steps(tmp_path / "run") == [best, train_iters]
    found, expected = (all_tensors(folder / f"iter_{best:07d}") for folder in (tmp_path / "run", tmp_path / "all"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert chosen_checkpoint(tmp_path / "run", "best") == tmp_path / "run" / f"iter_{best:07d}"
    assert chosen_checkpoint(tmp_path / "run", "last") == tmp_path / "run" / f"iter_{STEPS:07d}"
    job = LocalJob(tmp_path / "run", 0, "", None, train_iters=STEPS, on_interrupt="stop", patience=1)
    assert job.outcome()["best"] == f"step {best}: eval_loss {losses[best]:.4g}"
    with pytest.raises(ValueError, match="trained without keep_best"):
        chosen_checkpoint(tmp_path / "all", "best")
    with pytest.raises(ValueError, match="which is 'first'; choose last or best"):
        chosen_checkpoint(tmp_path / "run", "first")


def test_a_metric_that_no_evaluation_has_is_refused_before_the_first_step(inputs, tmp_path):
    with pytest.raises(
        RuntimeError, match="keep_best is 'eval_loss_mode_other', which no evaluation has; they have eval_loss"
    ):
        run(inputs, tmp_path / "run", keep_best="eval_loss_mode_other")
    assert not read_metrics(tmp_path / "run")


def theirs(run: Path, straight: Path) -> dict[Path, bytes]:
    """Folders of a user beside a run's checkpoints: a file in each of them -> its contents."""
    folders = [run / name for name in ("iter_best", "iter_0000009_backup", "iter_00000001", ".iter_best.old")]
    for folder in folders:
        shutil.copytree(newest(straight), folder)
    folders += [run / "iter_0000001", run / "iter_0000099"]
    for folder in folders[-2:]:
        folder.mkdir()
        (folder / "config.json").write_text("theirs")
    return {folder: (folder / "config.json").read_bytes() for folder in folders}


def test_what_only_looks_like_a_checkpoint_is_not_taken_for_one_and_never_removed(inputs, straight, tmp_path):
    output = tmp_path / "run"
    laid = theirs(output, straight[0])
    same(run(inputs, output, keep_last=1, save_interval=2), straight[1])
    assert steps(output) == [STEPS] and newest(output) == output / f"iter_{STEPS:07d}"
    assert {folder: (folder / "config.json").read_bytes() for folder in laid} == laid
    assert LocalJob(output, 0, "", None, train_iters=STEPS, on_interrupt="stop", patience=1).outcome()[
        "checkpoint"
    ] == str(newest(output))


NOT_FINISHED = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a manifest of zeros": lambda folder: (folder / MANIFEST).write_bytes(bytes(100)),
    "the manifest of another step": lambda folder: shutil.copyfile(
        folder.with_name("iter_0000002") / MANIFEST, folder / MANIFEST
    ),
    "somebody else's": lambda folder: [path.unlink() for path in folder.iterdir()] and (folder / "notes").touch(),
}


@pytest.mark.parametrize("case", NOT_FINISHED)
def test_a_run_goes_on_past_a_newest_checkpoint_that_was_not_finished_and_keeps_what_is_in_it(
    case, inputs, straight, tmp_path
):
    output = tmp_path / "run"
    shutil.copytree(straight[0], output)
    last = newest(output)
    NOT_FINISHED[case](last)
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    assert not start_training_would_find_it_finished(inputs, output)
    same(run(inputs, output), straight[1])
    assert newest(output) == last
    aside = output / f"{last.name}.set-aside-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    log = (output / "train.log").read_text()
    assert f"skipping a checkpoint: {last}" in log and f"renamed to {aside}" in log


def start_training_would_find_it_finished(inputs: dict, output: Path) -> bool:
    given = {"train_iters": STEPS, "save_interval": STEPS // 2, "eval_interval": 2, **inputs}
    return launch.training._finished(settings(output=str(output), **given), output)


def test_what_killed_saves_left_is_removed_at_the_next_start_unless_somebody_writes_it(inputs, straight, tmp_path):
    output = stopped_half_way(straight[0], tmp_path / "run")
    left = [".iter_0000003.tmp", ".iter_0000001.old", ".iter_0000002.old-0123abcd", ".iter_0000001.tmp"]
    for name in left:
        shutil.copytree(newest(output), output / name)
    with locked(output / left[-1]):
        run(inputs, output)
    assert [path.name for path in output.glob(".iter_*")] == [".iter_0000001.tmp"]
    assert f"not removed: {output / left[-1]} is being written by another process" in (output / "train.log").read_text()


def test_on_nfs_what_a_killed_save_left_is_removed_with_and_without_its_lock(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", nfs.flock)
    for name in (".iter_0000001.old", ".iter_0000002.tmp", ".iter_0000003.tmp", "iter_0000004", ".iter_best.tmp"):
        (tmp_path / name).mkdir()
    for name in (".iter_0000002.tmp.lock", ".iter_0000004.tmp.lock"):  # the last one had been renamed already
        (tmp_path / name).touch()
    with locked(tmp_path / ".iter_0000003.tmp"):
        remove_leftovers(tmp_path)
        kept = {".iter_0000003.tmp", ".iter_0000003.tmp.lock", ".iter_best.tmp", "iter_0000004"}
        assert set(os.listdir(tmp_path)) == kept and capsys.readouterr().out.count("not removed") == 1
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {".iter_best.tmp", "iter_0000004"}


def test_without_file_locks_a_run_continues_and_reports_leftovers(inputs, straight, tmp_path):
    output = stopped_half_way(straight[0], tmp_path / "run")
    for step in (3, STEPS):
        shutil.copytree(newest(output), output / f".iter_{step:07d}.tmp")
    given = {"train_iters": STEPS, "save_interval": STEPS // 2, "eval_interval": 2, **inputs}
    config, log = settings(output=str(output), **given), output / "train.log"
    forked.join(forked.start(_without_locks, 1, log, config), log)
    same(read_metrics(output), straight[1])
    assert [path.name for path in output.glob(".iter_*")] == [".iter_0000003.tmp"] and steps(output) == [2, STEPS]
    assert (
        f"not removed: {output / '.iter_0000003.tmp'} may be in use (no file locks on this file system)"
        in log.read_text()
    )


def _without_locks(config) -> None:
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = refuse
    forked.train_as_rank(config)


# --- a full disk


def test_too_little_disk_space_is_reported_before_a_checkpoint_is_written(inputs, tmp_path):
    output = tmp_path / "run"
    config = settings(output=str(output), train_iters=STEPS, save_interval=1, **inputs)
    processes = forked.start(_with_room_for_one, 2, output / "train.log", config)
    message = r"\.iter_0000002\.tmp needs [\d.]+ MB, .*run has [\d.]+ MB left: free some space"
    with pytest.raises(RuntimeError, match=message):
        forked.join(processes, output / "train.log")
    assert steps(output) == [1] and newest(output) and not list(output.glob(".iter_*"))


def _with_room_for_one(config) -> None:
    usage = namedtuple("usage", "total used free")
    size = lambda: sum(p.stat().st_size for p in Path(config.output).glob("*iter_*/*"))  # noqa: E731
    artifact.shutil.disk_usage = lambda path: usage(0, 0, 2**22 - size())
    forked.train_as_rank(config)


def test_a_disk_that_fills_up_during_a_save_is_reported_with_sizes_and_leaves_nothing(inputs, tmp_path):
    output = tmp_path / "run"
    given = {"train_iters": STEPS, "save_interval": 1, "async_save": True, "pipeline_parallel": 2, **inputs}
    config = settings(output=str(output), **given)
    processes = forked.start(_fill_up, 2, output / "train.log", config)
    message = (
        r"iter_0000002 was not written; rank 1: .*No space left.*iter_0000002 needs about 0.00[23] GB, .* GB are free"
    )
    with pytest.raises(RuntimeError, match=message):
        forked.join(processes, output / "train.log")
    assert steps(output) == [1] and newest(output) and not list(output.glob(".iter_*"))


def _fill_up(config) -> None:
    write = HashedFile.write

    def full(self, data):
        if "iter_0000002" in str(self.path) and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    HashedFile.write = full
    forked.train_as_rank(config)


def test_a_run_killed_at_five_random_moments_matches_an_uninterrupted_one_bit_for_bit(tmp_path):
    assert sum(killing.survive(tmp_path, kills=5, seed=1, steps=16).values()) == 5


def test_a_failed_rank_leaves_its_reason_and_no_checkpoint(inputs, tmp_path):
    with pytest.raises(RuntimeError, match="seq_length 16 allows 17: raise seq_length"):
        run(inputs, tmp_path / "run", 2, seq_length=16)
    assert newest(tmp_path / "run") is None
