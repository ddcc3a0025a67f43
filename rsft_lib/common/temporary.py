"""Temporary files and folders beside their final path: uniquely named, locked, and removed with their writer.

The lock is taken before the temporary path is created and released after it is gone. A killed writer leaves both
behind, unlocked, and the next writer of the same final path removes them. On a file system without locks, leftovers
are not removed.
"""

import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from rsft_lib.common.locks import locked


@contextmanager
def beside(final: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file or folder beside `final`; it is removed at the end unless it was renamed."""
    _remove_abandoned(final)
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    with locked(temporary):
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        try:
            yield temporary
        finally:
            remove(temporary)


@contextmanager
def new_file(final: Path, mode: str = "w") -> Iterator[IO]:
    """Yield a file to write, renamed to `final` atomically if the block succeeds: readers see the old or the new."""
    with beside(final) as temporary:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Create a folder that several processes share and hold it exclusively, waiting for other users.

    The previous holder may have filled or renamed the folder. At the end it is removed if it is empty, and so is its
    parent if this call created it.
    """
    with ExitStack() as stack:
        if not folder.parent.exists():
            stack.callback(_remove_empty, folder.parent)
        held = None
        while held is None:
            with suppress(FileNotFoundError):  # another process has just removed the empty parent
                folder.parent.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(folder))
        folder.mkdir(exist_ok=True)
        stack.callback(_remove_empty, folder)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _remove_abandoned(final: Path) -> None:
    for lock in final.parent.glob(f".{glob.escape(final.name)}.tmp-????????.lock"):
        abandoned = lock.with_suffix("")
        with suppress(OSError), locked(abandoned, wait=False) as held:  # BlockingIOError: its writer is alive
            if held:
                remove(abandoned)


def remove(path: Path) -> None:
    """Remove a file or folder; files are truncated first, since open handles would keep their disk space."""
    is_folder = path.is_dir() and not path.is_symlink()
    for file in path.rglob("*") if is_folder else [path]:
        with suppress(OSError):
            status = file.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:  # no other hard link shares the content
                os.truncate(file, 0)
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
