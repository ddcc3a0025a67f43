"""Removal of old checkpoints and leftovers; only files written by this kit are ever deleted."""

import itertools
import os
import re
import shutil
import uuid
from pathlib import Path

from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints, step_of
from rsft_lib.common.artifact import foreign
from rsft_lib.common.locks import locked
from rsft_lib.training.best import best_step

# Left behind by an interrupted save, removal or replacement; with `.lock`, its lock file.
LEFTOVER = re.compile(r"(\.iter_\d{7,}\.(?:tmp|old(?:-[0-9a-f]{8})?))(?:\.lock)?")
REPORTED: set[Path] = set()  # kept checkpoints that were reported already


def remove_old(output: Path, iteration: int, keep_last: int, keep_every: int, keep_best: str = "") -> None:
    """Remove all checkpoints up to step `iteration` except the last `keep_last`, those at multiples of `keep_every` and
    the best by the metric `keep_best`; `keep_last` 0 keeps all.

    Later checkpoints are ignored: they are damaged, or the run would have resumed from them. Symbolic links and
    checkpoints with files of the user are kept. A folder is renamed before it is deleted, so that anything named like a
    checkpoint is complete.
    """
    if not keep_last:
        return
    steps = [step for step in map(step_of, checkpoints(output)) if step <= iteration]
    best = best_step(output, keep_best, steps)
    for step in steps[:-keep_last]:
        if (keep_every and step % keep_every == 0) or step == best:
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
    """Whether a checkpoint is a symbolic link or contains files that this kit did not write; prints the reason once."""
    others = [] if folder.is_symlink() else foreign(folder)
    why = "it is a link" if folder.is_symlink() else f"this kit did not write {others[0]} in it" if others else ""
    if why and folder not in REPORTED:
        REPORTED.add(folder)
        print(f"not removed: {folder}, since {why}", flush=True)
    return bool(why)


def remove_leftovers(output: Path) -> None:
    """Remove leftovers of interrupted saves and removals, except folders that another process has locked.

    Anything with such a name that is not a folder was not written by this kit, and is renamed.
    """
    leftovers = sorted({match[1] for path in output.glob(".iter_*") if (match := LEFTOVER.fullmatch(path.name))})
    for folder in (output / name for name in leftovers):
        try:
            with locked(folder, wait=False) as alone:
                if not os.path.lexists(folder):
                    continue
                if folder.is_symlink() or not folder.is_dir():
                    print(f"{folder} was not written by this kit: renamed to {_renamed(folder)}", flush=True)
                elif alone:
                    shutil.rmtree(folder)
                else:
                    print(f"not removed: {folder} may be in use (no file locks on this file system); remove it by hand")
        except BlockingIOError as error:
            print(f"not removed: {error.strerror}", flush=True)


def set_aside(final: Path) -> None:
    """Rename a folder at the path of a new checkpoint unless it is a checkpoint written only by this kit."""
    if not final.exists() or (final in checkpoints(final.parent) and not foreign(final)):
        return
    print(f"{final} is incomplete or contains files not written by this kit: renamed to {_renamed(final)}", flush=True)


def _renamed(path: Path) -> Path:
    """Rename a file or folder to an unused name and return its new path."""
    names = (path.with_name(f"{path.name}.set-aside-{number}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not os.path.lexists(name)))
