"""Token losses that are made once, and found again as long as checkpoint and data are the same."""

import hashlib
from pathlib import Path

from rsft_lib.common.artifact import MANIFEST, verify
from rsft_lib.common.paths import existing, resolve
from rsft_lib.evaluation.score import TokenLosses
from rsft_lib.launch import launch_scoring


def scored(checkpoint: str | Path, data: str | Path, folder: str | Path, nproc: int) -> TokenLosses:
    """The token losses of data under a checkpoint, from `<folder>-<what they are of>` if they are there already.

    Raises:
        FileNotFoundError: the checkpoint or the data is missing.
        RuntimeError: the scoring failed; the message has the traceback.
    """
    checkpoint, data = existing(checkpoint, "checkpoint"), existing(data, "data")
    folder = resolve(f"{folder}-{_identity(checkpoint, data)}")
    try:
        verify(folder)
        print(f"{folder} is there already, of the same checkpoint and data")
    except (OSError, ValueError):
        launch_scoring(checkpoint, data, folder, nproc)
    return TokenLosses(folder)


def _identity(checkpoint: Path, data: Path) -> str:
    """Twelve digits that are others where the checkpoint or the data is another."""
    digest = hashlib.sha256(str(checkpoint).encode())
    for folder in (checkpoint, data):
        if (folder / MANIFEST).is_file():
            digest.update((folder / MANIFEST).read_bytes())
        else:  # of somebody else
            files = sorted(path for path in folder.iterdir() if path.is_file())
            digest.update(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode())
    return digest.hexdigest()[:12]
