"""Errors and cleanup on a full disk.

The last test fills a small tmpfs in a mount namespace; it is skipped where none can be created.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rsft_lib import demo
from rsft_lib.common import disk
from rsft_lib.common.artifact import new_folder
from rsft_lib.tokenizer.patch import patch_tokenizer

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
STEPS = """
import json, os, sys
from pathlib import Path
from rsft_lib.common import artifact
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.tokenize import tokenize

artifact.require_space = lambda final, size: None  # as if another process used up the space afterwards
made, disk = Path(sys.argv[1]), Path(sys.argv[2])
long, short = (made / "sources" / f"{name}.jsonl" for name in ("long", "short"))
steps = {
    "build": lambda to: build_hybrid(long, short, to, 0.1, 1),
    "tokenize": lambda to: tokenize(made / "sources" / "long.jsonl", made / "tokenizer", to, 513, workers=0),
    "convert": lambda to: convert(made / "model", to),
    "legacy": lambda to: convert(made / "model", to, format="legacy"),
    "export": lambda to: export(made / "model", made / "tokenizer", to),
}
outcome = {}
for name, step in steps.items():
    try:
        step(disk / name)
    except OSError as error:
        outcome[name] = [error.errno, str(error), os.listdir(disk), os.statvfs(disk).f_bfree * 4096]
print(json.dumps(outcome))
"""


@pytest.mark.parametrize("number", disk.FULL)
def test_a_full_disk_error_has_the_final_path_and_sizes_and_nothing_is_left(tmp_path, number):
    def fill(folder: Path) -> None:
        (folder / "part").write_bytes(bytes(3_000_000))
        raise OSError(number, os.strerror(number), str(folder / "part"))

    with pytest.raises(OSError, match="out was not made; 3.0 MB of 9.0 MB were written.* free in ") as error:
        with new_folder(tmp_path / "out", {"made_by": "step"}, size=9_000_000) as folder:
            fill(folder)
    assert error.value.errno == errno.ENOSPC and str(tmp_path / "out ") in str(error.value)
    assert os.listdir(tmp_path) == []


def test_errors_of_libraries_without_errno_are_recognised_if_the_disk_is_full(tmp_path, monkeypatch):
    """safetensors, NumPy and torch raise errors without an errno; unrelated errors are unchanged."""
    monkeypatch.setattr(disk, "_can_write", lambda folder: False)
    with pytest.raises(OSError, match="out was not made"), new_folder(tmp_path / "out", {"made_by": "step"}):
        raise SafetensorError("I/O error")
    with pytest.raises(ValueError, match="^a row$"), new_folder(tmp_path / "out", {"made_by": "step"}):
        raise ValueError("a row")
    monkeypatch.undo()
    with pytest.raises(SafetensorError, match="I/O error"), new_folder(tmp_path / "out", {"made_by": "step"}):
        raise SafetensorError("I/O error")
    assert os.listdir(tmp_path) == []


def test_every_step_explains_a_full_disk_and_leaves_nothing(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = f"mount -t tmpfs -o size=2m tmpfs {place}"
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed (apt install util-linux)")
    tried = subprocess.run([*NAMESPACE, "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    demo.make_model(tmp_path / "made" / "model", seed=0)
    demo.make_sources(tmp_path / "made" / "sources", 11_000, seed=0)
    patch_tokenizer(tmp_path / "made" / "model", tmp_path / "made" / "tokenizer", {"<|quad_start|>": "<short>"})
    child = f"{mount} && exec {sys.executable} -c '{STEPS}' {tmp_path / 'made'} {place}"
    done = subprocess.run([*NAMESPACE, "sh", "-c", child], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert list(outcome) == ["build", "tokenize", "convert", "legacy", "export"]
    for name, (number, message, left, free) in outcome.items():
        final = place / (f"{name}_TP1PP1" if name == "legacy" else name)
        assert number == errno.ENOSPC and f" {final} was not made; " in message, message
        assert f" MB are free in {place} now" in message and " were written and have been removed" in message
        written, whole = map(float, re.search(r" ([\d.,]+) MB of ([\d.,]+) MB were written", message).groups())
        # The scratch file of `build` uses space, but is not counted as written.
        assert 2.1 < whole < 9 and written <= 2.1 and (written > 1 or name == "build"), message
        assert left == [] and free == 2 << 20, name
