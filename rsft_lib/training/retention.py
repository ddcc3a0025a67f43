"""Which checkpoints of a run folder stay, and what else is removed there: nothing that this kit did not write."""

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsft_lib.artifact import checkpoint_folder, checkpoints

# What is left where a save, a removal or a replacement was cut off.
LEFTOVER = re.compile(r"\.iter_\d{7,}\.(tmp|old(-[0-9a-f]{8})?)")


def remove_old(output: Path, iteration: int, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints up to step `iteration` but the last `keep_last` and those of steps that divide by
    `keep_every`; 0 keeps all.

    Later ones are damaged, else the run had gone on from them, and none of the last that are kept. A folder is renamed
    before it is emptied, so what has the name of a checkpoint is whole.
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
    """Remove what saves and removals left that were cut off. What somebody still writes is locked, and stays."""
    for folder in filter(lambda path: LEFTOVER.fullmatch(path.name), output.glob(".iter_*")):
        try:
            with locked(folder) as alone:
                if alone:
                    shutil.rmtree(folder)
                else:
                    print(f"{folder} stays: nothing tells here whether it is still written; remove it by hand")
        except BlockingIOError as error:
            print(f"{folder} stays: {error.strerror}", flush=True)


def set_aside(final: Path) -> None:
    """Let a folder that has a checkpoint's name but is none of this kit's keep its content under another name."""
    if not final.exists() or final in checkpoints(final.parent):
        return
    names = (final.with_name(f"{final.name}.set-aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    final.rename(aside)
    print(f"{final} was no checkpoint that this kit finished; it is {aside} now", flush=True)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; False where the file system knows no locks.

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
            told = f"another process writes {folder}; does a second training run in this folder?"
            raise BlockingIOError(error.errno, told) from None
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)  # and the lock is gone


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("iter_"))
