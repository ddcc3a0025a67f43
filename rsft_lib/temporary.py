"""What is being written beside its final name: under a name of its own, locked, and gone when its writer is.

No two processes share a temporary name. One that was killed leaves its file or folder behind, with a lock that nobody
holds, and the next writer of the same final name removes it. On a file system without locks nothing is removed.
"""

import fcntl
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def beside(final: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a new empty file or folder beside `final`, which is removed at the end if it still has its name."""
    _remove_abandoned(final)
    temporary, lock = _locked(final, folder)
    try:
        yield temporary
    finally:
        remove(temporary)
        os.close(lock)


@contextmanager
def new_file(final: Path, mode: str = "w") -> Iterator[IO]:
    """Yield a file to write, which becomes `final` in one move when the block ends well: readers see old or new."""
    with beside(final) as temporary:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(final)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder that processes share, and wait until no other one uses it.

    Whoever waited finds what the one before has done, which may be to rename the folder. At the end it is removed if
    it is empty, and so is a parent that was made for it.
    """
    first = not folder.parent.exists()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        if not _held(lock, wait=False):
            print(f"waiting for another process that uses {folder}", flush=True)
            _held(lock, wait=True)
        if _same(lock, folder):
            break
        os.close(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            if _same(lock, folder):
                folder.rmdir()
            if first:
                folder.parent.rmdir()
        os.close(lock)


def _locked(final: Path, folder: bool) -> tuple[Path, int]:
    """(a new file or folder, the descriptor that holds its lock)."""
    while True:
        temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir() if folder else temporary.touch(exist_ok=False)
        with suppress(FileNotFoundError):
            lock = os.open(temporary, os.O_RDONLY)
            _held(lock, wait=True)
            if temporary.exists():
                return temporary, lock
            os.close(lock)
        # Another process took it for abandoned before it was locked.


def _remove_abandoned(final: Path) -> None:
    for left in final.parent.glob(f".{glob.escape(final.name)}.tmp-*"):
        with suppress(OSError):  # it has gone meanwhile, or is somebody else's
            lock = os.open(left, os.O_RDONLY)
            if _held(lock, wait=False, unknown=False):
                remove(left)
            os.close(lock)


def _held(lock: int, wait: bool, unknown: bool = True) -> bool:
    """Whether a lock could be had; `unknown` where the file system has none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return unknown


def _same(lock: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(lock), path.stat())


def remove(path: Path) -> None:
    """Remove a file or folder, its content first: whoever failed to fill it may hold files open, and so their space."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(OSError):
            found = file.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # and so nobody else's
                os.truncate(file, 0)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
