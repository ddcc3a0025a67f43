"""Atomic output folders, temporary files and locks."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nfs
import pytest
from support import TESTS

from rsft_lib.common import artifact, locks, temporary
from rsft_lib.common.artifact import new_folder, read_manifest, verify
from rsft_lib.common.temporary import alone, new_file
from rsft_lib.data.rejects import Reject, Rejects


def test_a_failed_step_keeps_the_previous_folder_and_foreign_folders_are_refused(tmp_path):
    final = tmp_path / "out"
    with new_folder(final, {"made_by": "step"}) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(final, {"made_by": "step"}) as folder:
        (folder / "file").write_text("new")
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsError, match="was not written by another"), new_folder(final, {"made_by": "another"}):
        pass
    (final / "file").write_text("odl")
    with pytest.raises(ValueError, match="damaged or was edited"):
        verify(final)


@pytest.mark.parametrize("flock", ["fcntl.flock", "nfs.flock"])
def test_leftovers_of_killed_processes_are_removed_and_those_of_live_ones_are_not(tmp_path, monkeypatch, flock):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
    monkeypatch.setattr(fcntl, "flock", {"fcntl.flock": fcntl.flock, "nfs.flock": nfs.flock}[flock])
    script = f"""
import fcntl, os, signal, sys
import nfs
fcntl.flock = {flock}
from pathlib import Path
from rsft_lib.common.artifact import new_folder
with new_folder(Path({str(tmp_path / "out")!r}), {{"made_by": "step"}}) as folder:
    (folder / sys.argv[1]).touch()
    print("filled", flush=True)
    input() or os.kill(os.getpid(), signal.SIGKILL)
"""

    def writer(name):
        process = subprocess.Popen([sys.executable, "-c", script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        return process

    killed, alive = writer("killed"), writer("alive")
    killed.communicate(b"\n")
    with new_folder(tmp_path / "out", {"made_by": "step"}) as folder:
        assert sorted(path.name for path in tmp_path.glob(".out.tmp-*/*")) == ["alive"]
        (folder / "mine").touch()
    alive.communicate(b"go on\n")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "alive").exists()


def test_a_cleanup_between_creating_and_taking_a_lock_removes_nothing(tmp_path, monkeypatch):
    """The other process acquires the new lock first and removes its file; the writer then creates and locks another."""
    final, flock, seen = tmp_path / "out", fcntl.flock, []

    def late(descriptor, how):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 1:
            temporary._remove_abandoned(final)
        return flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_folder(final, {"made_by": "step"}) as folder:
        (folder / "file").touch()
    assert (final / "file").exists() and len(seen[0]) == 1 and seen[2] == seen[0]  # the lock file is created again
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_without_file_locks_everything_works_and_leftovers_are_not_removed(tmp_path, monkeypatch, capsys, number):
    """The errors of file systems without locks, such as Lustre without `flock`."""

    def none(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    locks.REPORTED.clear()
    others = [".out.tmp-0123abcd", ".out.tmp-0123abcd.lock"]
    (tmp_path / others[0]).mkdir()
    (tmp_path / others[1]).touch()
    for content in ("old", "new"):
        with new_folder(tmp_path / "out", {"made_by": "step"}) as folder:
            (folder / "file").write_text(content)
    with new_file(tmp_path / "text") as file, alone(tmp_path / "shared"):
        file.write("text")
    assert (tmp_path / "out" / "file").read_text() == "new" and (tmp_path / "text").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == [*others, "out", "text"]
    assert capsys.readouterr().out.count(f"no locks in {tmp_path}") == 1


def test_concurrent_writers_use_different_temporary_names_and_the_last_one_wins(tmp_path):
    with new_file(tmp_path / "text") as one:
        one.write("one")
        with new_file(tmp_path / "text") as other:
            other.write("other")
        assert (tmp_path / "text").read_text() == "other"
    with pytest.raises(KeyError), new_file(tmp_path / "text") as third:
        third.write("third")
        raise KeyError
    assert (tmp_path / "text").read_text() == "one" and os.listdir(tmp_path) == ["text"]


def test_concurrent_rejects_of_one_output_are_not_mixed(tmp_path):
    row = Reject("data.jsonl", 1, "a reason", "a row")
    with Rejects(tmp_path / "out", limit=1.0) as one, Rejects(tmp_path / "out", limit=1.0) as other:
        one.add([row], seen=9)
        other.add([row._replace(line=number) for number in (2, 3)], seen=9)
        for rejects, count in ((other, 2), (one, 1)):
            rejects.settle(9)
            assert len(rejects.path.read_text().splitlines()) == count
    assert os.listdir(tmp_path) == ["out.rejected.jsonl"]


def test_a_second_user_of_a_shared_folder_waits_and_sees_the_result_of_the_first(tmp_path, capfd):
    shared, order, inside = tmp_path / ".download", [], threading.Event()

    def first():
        with alone(shared):
            inside.set()
            end = time.monotonic() + 60
            while "waiting for another process" not in capfd.readouterr().out and time.monotonic() < end:
                time.sleep(0.01)
            order.append("first")
            (shared / "file").touch()
            shared.rename(tmp_path / "final")

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with alone(shared):
        order.append("second")
        assert (tmp_path / "final" / "file").exists() and os.listdir(shared) == []
    thread.join()
    assert order == ["first", "second"] and os.listdir(tmp_path) == ["final"]


def test_a_parent_that_another_process_removes_is_created_again(tmp_path, monkeypatch):
    mkdir, seen = Path.mkdir, []

    def undone(path, *args, **kwargs):
        mkdir(path, *args, **kwargs)
        seen.append(path)
        if len(seen) == 1:
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", undone)
    with alone(tmp_path / "models" / ".download"):
        assert os.listdir(tmp_path / "models" / ".download") == []
    assert os.listdir(tmp_path) == [] and len(seen) > 1


def test_shared_folders_are_locked_on_nfs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fcntl, "flock", nfs.flock)
    test_a_second_user_of_a_shared_folder_waits_and_sees_the_result_of_the_first(tmp_path, capfd)


def filled(final, text, made_by="step"):
    with new_folder(final, {"made_by": made_by}) as folder:
        (folder / "file").write_text(text)


def test_a_folder_that_a_killed_process_moved_aside_is_restored_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{TESTS}", prepend=":")
    final = tmp_path / "out"
    filled(final, "old")
    script = f"""
import os, signal
from pathlib import Path
from rsft_lib.common import artifact
import test_artifact
artifact._swapped = lambda one, other: False
rename = Path.rename
def killed(path, target):
    rename(path, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
test_artifact.filled(Path({str(final)!r}), "new")
"""
    for again in range(2):
        assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
        assert not final.exists() and len(list(tmp_path.glob(".out.old-*"))) == 1
        if again:
            filled(final, "newer")
            assert (final / "file").read_text() == "newer"
        else:
            with pytest.raises(FileExistsError, match="was not written by another"):
                filled(final, "new", made_by="another")
            assert (final / "file").read_text() == "old" and verify(final)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_partially_removed_folder_is_not_restored(tmp_path, manifest):
    """It is not needed if the folder itself exists, and not complete without a manifest."""
    final, old = tmp_path / "out", tmp_path / ".out.old-0123abcd"
    if manifest:
        filled(final, "out")
    shutil.copytree(final, old) if manifest else old.mkdir()
    (old / "file").write_text("older")
    filled(final, "new")
    assert (final / "file").read_text() == "new" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("swap", [True, False])
def test_a_failed_rename_keeps_the_previous_folder(tmp_path, monkeypatch, swap):
    final, rename = tmp_path / "out", Path.rename
    filled(final, "old")

    def broken(path, target):
        if ".tmp-" in path.name:
            raise OSError(errno.EIO, "broken")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    if swap:
        filled(final, "new")
        assert (final / "file").read_text() == "new"  # names are exchanged, so rename is not called
    else:
        monkeypatch.setattr(artifact, "_swapped", lambda one, other: False, raising=False)
        with pytest.raises(OSError, match="broken"):
            filled(final, "new")
        assert (final / "file").read_text() == "old"
    assert verify(final) and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_concurrent_replacements_of_a_folder_both_succeed(tmp_path, monkeypatch, moment):
    final, rename, count = tmp_path / "out", Path.rename, []
    filled(final, "old")
    monkeypatch.setattr(artifact, "_swapped", lambda one, other: False, raising=False)

    def meanwhile(path, target):
        rename(path, target)
        count.append(path)
        if len(count) == moment:
            filled(final, "other")

    monkeypatch.setattr(Path, "rename", meanwhile)
    filled(final, "new")
    assert (final / "file").read_text() == ("other" if moment == 2 else "new")
    assert verify(final) and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("swap", [True, False])
def test_replacing_a_link_does_not_touch_its_target(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(artifact, "_swapped", lambda one, other: False, raising=False)
    filled(tmp_path / "there", "old")
    (tmp_path / "out").symlink_to("there")
    filled(tmp_path / "out", "new")
    assert (tmp_path / "there" / "file").read_text() == "old" and verify(tmp_path / "there")
    assert (tmp_path / "out" / "file").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["out", "there"]


def replaced(final, source, overwrite=False, **facts):
    with new_folder(final, {"made_by": "step"} | facts, source=source, overwrite=overwrite):
        pass


def test_output_from_another_source_is_replaced_only_with_overwrite(tmp_path):
    final = tmp_path / "out"
    made = {"model": "/a", "model_sha256": "1", "option": 1}
    replaced(final, ["model"], **made)
    replaced(final, ["model"], **made | {"option": 2})
    replaced(final, ["model"], **made | {"model_sha256": "2"})  # same name, other content: rebuilt
    replaced(final, ["model"], **made | {"model": "/moved", "model_sha256": "2"})  # other name, same content
    with pytest.raises(FileExistsError, match="out was made from /moved and is not replaced by output made from /b: "):
        replaced(final, ["model"], model="/b", model_sha256="3")
    with pytest.raises(FileExistsError, match="choose another `output`, or set `overwrite`"):
        replaced(final, ["model"], model="/b", model_sha256=None)
    assert read_manifest(final)["model"] == "/moved"
    replaced(final, ["model"], overwrite=True, model="/b", model_sha256=None)
    assert read_manifest(final)["model"] == "/b" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsError, match="was made from /b"):
        replaced(final, ["model"], model="/c", model_sha256=None)
    with pytest.raises(FileExistsError, match="was not written by another"):
        replaced(final, [], overwrite=True, made_by="another")


def test_all_sources_are_compared_and_output_without_a_source_is_not_replaced(tmp_path):
    final = tmp_path / "out"
    replaced(final, ["sources", "tokenizer"], sources={"/long": "1", "/short": "2"}, tokenizer="/t")
    replaced(final, ["sources", "tokenizer"], sources={"/l": "1", "/s": "2"}, tokenizer="/t")
    for other in (
        {"sources": {"/l": "1"}, "tokenizer": "/t"},  # otherwise any source could be reached in steps
        {"sources": {"/l": "1", "/s": "2", "/x": "3"}, "tokenizer": "/t"},
        {"sources": {"/l": "1", "/x": "3"}, "tokenizer": "/t"},
        {"sources": {"/l": "1", "/s": "2"}, "tokenizer": "/u"},
    ):
        with pytest.raises(FileExistsError, match="choose another `output`"):
            replaced(final, ["sources", "tokenizer"], **other)
    replaced(final, [])
    with pytest.raises(FileExistsError, match="was made from an unknown source"):
        replaced(final, ["tokenizer"], tokenizer="/t")


def test_of_concurrent_writers_with_different_sources_the_second_to_finish_is_refused(tmp_path):
    with (
        pytest.raises(FileExistsError, match="was made from /b and is not replaced by output made from /a"),
        new_folder(tmp_path / "out", {"made_by": "step", "model": "/a"}, source=["model"]),
    ):
        replaced(tmp_path / "out", ["model"], model="/b")
    assert read_manifest(tmp_path / "out")["model"] == "/b" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "name", ["my_notes.txt", "within/results.json", "tokens/mine.npy", "a link", "manifest.old.json"]
)
def test_foreign_files_in_a_folder_are_deleted_only_with_overwrite(tmp_path, name):
    final = tmp_path / "out"
    filled(final, "old")
    filled(final / "tokens", "tokens")
    (final / "within").mkdir()
    (final / name).symlink_to(tmp_path) if name == "a link" else (final / name).write_text("mine")
    with pytest.raises(
        FileExistsError, match=f"contains files that step did not write: {name}. Move .* or set `overwrite`"
    ):
        filled(final, "new")
    assert (final / name).exists() and (final / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    with new_folder(final, {"made_by": "step"}, overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert sorted(os.listdir(final)) == ["file", "manifest.json"]


def test_of_many_foreign_files_three_are_named(tmp_path):
    filled(tmp_path / "out", "old")
    for number in range(5):
        (tmp_path / "out" / f"{number}.txt").touch()
    with pytest.raises(FileExistsError, match="write: 0.txt, 1.txt, 2.txt and 2 more. Move"):
        filled(tmp_path / "out", "new")


def test_files_of_other_steps_and_of_tools_are_replaced_with_the_folder(tmp_path):
    final = tmp_path / "out"
    filled(final, "old")
    filled(final / "tokens", "tokens")
    for name in ("verify.json", "other.rejected.jsonl", ".ipynb_checkpoints/a.ipynb", "__pycache__/a.pyc",
                 "tokens/verify.json", ".other.tmp-0123abcd/half", ".other.tmp-0123abcd.lock"):  # fmt: skip
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).touch()
    (final / "file").write_text("edited")
    filled(final, "new")
    assert sorted(os.listdir(final)) == ["file", "manifest.json"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "null", '{"made_by": ["step"]}', '{"made_by": "step", "model": ["a"]}',
             '{"made_by": "step", "model": 5}', '{"made_by": "step", "model": {"a": [1]}}',
             '{"made_by": "step", "model": "/a", "model_sha256": 7}'],
)  # fmt: skip
def test_a_damaged_manifest_is_reported_and_nothing_is_replaced(tmp_path, text):
    final = tmp_path / "out"
    filled(final, "old")
    (final / "manifest.json").write_text(text)
    with pytest.raises(
        FileExistsError, match=f"{final} (exists and was not written by|was made from an unknown source)"
    ):
        replaced(final, ["model"], model="/a", model_sha256="1")
    with pytest.raises(ValueError, match="manifest.json is damaged or was edited"):
        verify(final)
    assert (final / "file").read_text() == "old"


def test_a_manifest_without_files_is_damaged(tmp_path):
    content = {"made_by": "step"}
    artifact.write_json(tmp_path / "manifest.json", content | {"manifest_sha256": artifact._own_hash(content)})
    with pytest.raises(ValueError, match="manifest.json is damaged or was edited"):
        verify(tmp_path)
