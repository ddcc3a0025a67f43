"""Folders that are whole or absent: pytest tests/test_artifact.py"""

import os

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
