"""Retention of a run's checkpoints, and removal of leftovers: only what this kit wrote is ever deleted."""

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsft_lib.artifact import checkpoint_folder, checkpoints

# Left behind by an interrupted save, removal or replacement.
LEFTOVER = re.compile(r"\.iter_\d{7,}\.(tmp|old(-[0-9a-f]{8})?)")


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
    for folder in filter(lambda path: LEFTOVER.fullmatch(path.name), output.glob(".iter_*")):
        try:
            with locked(folder) as alone:
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


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; yields False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError as error:
        if isinstance(error, BlockingIOError):
            os.close(descriptor)
            message = f"{folder} is being written by another process; is a second training running in this folder?"
            raise BlockingIOError(error.errno, message) from None
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)  # and the lock is gone


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
