"""Folders that are whole or absent: pytest tests/test_artifact.py"""

import os
import subprocess
import sys

import pytest

from rsft_lib.artifact import new_folder, verify


def test_a_step_that_fails_leaves_the_folder_of_before_and_foreign_ones_are_kept(tmp_path):
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


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_another_writes_is_not(tmp_path):
    script = f"""
import os, signal, sys
from pathlib import Path
from rsft_lib.artifact import new_folder
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
