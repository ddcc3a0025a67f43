"""Token losses, cached by checkpoint and data."""

import hashlib
import time
from pathlib import Path

from rsft_lib.common.artifact import MANIFEST, verify
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.evaluation.token_losses import TokenLosses
from rsft_lib.launch import launch_scoring


def scored(checkpoint: str | Path, data: str | Path, folder: str | Path, nproc: int) -> TokenLosses:
    """The token losses of data under a checkpoint, from `<folder>-<key>` if that exists, else computed there.

    Raises:
        FileNotFoundError: the checkpoint or the data is missing.
        RuntimeError: scoring failed; the message contains the traceback.
    """
    checkpoint, data = require_path(checkpoint, "checkpoint"), require_path(data, "data")
    folder = resolve(f"{folder}-{_cache_key(checkpoint, data)}")
    try:
        verify(folder)
        print(f"{folder}: using cached losses of this checkpoint and data")
    except (OSError, ValueError):
        began = time.monotonic()
        launch_scoring(checkpoint, data, folder, nproc)
        print(f"{folder}: losses computed in {time.monotonic() - began:,.0f} s")
    return TokenLosses(folder)


def _cache_key(checkpoint: Path, data: Path) -> str:
    """A 12-hex-digit key that changes with checkpoint or data."""
    digest = hashlib.sha256(str(checkpoint).encode())
    for folder in (checkpoint, data):
        if (folder / MANIFEST).is_file():
            digest.update((folder / MANIFEST).read_bytes())
        else:  # not written by this kit
            files = sorted(path for path in folder.iterdir() if path.is_file())
            digest.update(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode())
    return digest.hexdigest()[:12]
