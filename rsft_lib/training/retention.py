"""Retention of a run's checkpoints, and removal of leftovers: only what this kit wrote is ever deleted."""

import itertools
import re
import shutil
from pathlib import Path

from rsft_lib.artifact import checkpoint_folder, checkpoints
from rsft_lib.locks import locked

# Left behind by an interrupted save, removal or replacement, with or without its lock.
LEFTOVER = re.compile(r"(\.iter_\d{7,}\.(?:tmp|old(?:-[0-9a-f]{8})?))(?:\.lock)?")


def remove_old(output: Path, iteration: int, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints up to step `iteration` except the last `keep_last` and those at multiples of `keep_every`;
    0 keeps all.

    Later ones are damaged, or the run would have resumed from them, and do not count. A folder is renamed before it is
    emptied, so whatever has the name of a checkpoint is complete.
    """
    if not keep_last:
        return
    steps = [step for step in map(_step, checkpoints(output)) if step <= iteration]
    for step in steps[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        folder = checkpoint_folder(output, step)
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        shutil.rmtree(old)


def remove_leftovers(output: Path) -> None:
    """Remove what interrupted saves and removals left behind, except folders that another process has locked."""
    found = sorted({match[1] for path in output.glob(".iter_*") if (match := LEFTOVER.fullmatch(path.name))})
    for folder in (output / name for name in found):
        try:
            with locked(folder, wait=False) as alone:
                if not folder.exists():
                    continue
                if alone:
                    shutil.rmtree(folder)
                else:
                    print(f"not removed: {folder} may be in use, and this file system has no locks; remove it by hand")
        except BlockingIOError as error:
            print(f"not removed: {error.strerror}", flush=True)


def set_aside(final: Path) -> None:
    """Rename a folder that is in the way of a checkpoint and was not written by this kit; nothing in it is lost."""
    if not final.exists() or final in checkpoints(final.parent):
        return
    names = (final.with_name(f"{final.name}.set-aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    final.rename(aside)
    print(f"{final} is not a complete checkpoint of this kit: renamed to {aside}", flush=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
