"""Retention of a run's checkpoints, and removal of leftovers: only what this kit wrote is ever deleted."""

import itertools
import os
import re
import shutil
import uuid
from pathlib import Path

from rsft_lib.common.artifact import checkpoint_folder, checkpoints, foreign
from rsft_lib.common.locks import locked

# Left behind by an interrupted save, removal or replacement, with or without its lock.
LEFTOVER = re.compile(r"(\.iter_\d{7,}\.(?:tmp|old(?:-[0-9a-f]{8})?))(?:\.lock)?")
TOLD: set[Path] = set()  # checkpoints of which it was said why they stay


def remove_old(output: Path, iteration: int, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints up to step `iteration` except the last `keep_last` and those at multiples of `keep_every`;
    0 keeps all.

    Later ones are damaged, or the run would have resumed from them, and do not count. One that was moved elsewhere,
    with a link in its place, stays, and so does one into which somebody has put files. A folder is renamed before it is
    emptied, so whatever has the name of a checkpoint is complete.
    """
    if not keep_last:
        return
    steps = [step for step in map(_step, checkpoints(output)) if step <= iteration]
    for step in steps[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        folder = checkpoint_folder(output, step)
        if _stays(folder):
            continue
        old = folder.with_name(f".{folder.name}.old")
        if os.path.lexists(old):
            old = old.with_name(f"{old.name}-{uuid.uuid4().hex[:8]}")
        folder.rename(old)
        shutil.rmtree(old)


def _stays(folder: Path) -> bool:
    """Whether a checkpoint is, or holds, what this kit did not write; that is said once."""
    others = [] if folder.is_symlink() else foreign(folder)
    why = "it is a link" if folder.is_symlink() else f"{others[0]} in it is not of this kit" if others else ""
    if why and folder not in TOLD:
        TOLD.add(folder)
        print(f"not removed: {folder}, since {why}", flush=True)
    return bool(why)


def remove_leftovers(output: Path) -> None:
    """Remove what interrupted saves and removals left behind, except folders that another process has locked.

    What has such a name and is no folder was not written by this kit, and is renamed.
    """
    found = sorted({match[1] for path in output.glob(".iter_*") if (match := LEFTOVER.fullmatch(path.name))})
    for folder in (output / name for name in found):
        try:
            with locked(folder, wait=False) as alone:
                if not os.path.lexists(folder):
                    continue
                if folder.is_symlink() or not folder.is_dir():
                    print(f"{folder} is no folder of this kit: renamed to {_renamed(folder)}", flush=True)
                elif alone:
                    shutil.rmtree(folder)
                else:
                    print(f"not removed: {folder} may be in use, and this file system has no locks; remove it by hand")
        except BlockingIOError as error:
            print(f"not removed: {error.strerror}", flush=True)


def set_aside(final: Path) -> None:
    """Rename a folder that is in the way of a checkpoint and was not, or not all, written by this kit."""
    if not final.exists() or (final in checkpoints(final.parent) and not foreign(final)):
        return
    print(f"{final} is not a complete checkpoint of this kit, or holds more: renamed to {_renamed(final)}", flush=True)


def _renamed(path: Path) -> Path:
    """Where a file or folder is after it was renamed, so that it is not in the way and nothing in it is lost."""
    names = (path.with_name(f"{path.name}.set-aside-{number}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not os.path.lexists(name)))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
