"""Locks between processes, of one machine or several: a file beside what is locked, there while somebody holds it.

The file is open for writing, as NFS asks for, which therefore locks no folder. Whoever is killed leaves the file, with
a lock that nobody holds.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # of a file system
TOLD: set[int] = set()  # numbers of file systems of which it was said that they have none


def lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder, which need not be there; yields False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is not set.
    """
    lock = lock_file(path)
    made = not lock.exists()
    while True:
        with lock.open("a+") as file:
            held = _take(file, path, wait)
            if held and not _same(file, lock):
                continue  # whoever held it has removed it; another one may hold a new file by now
            try:
                yield held
            finally:
                if held or made:
                    lock.unlink(missing_ok=True)
            return


def _take(file: IO, path: Path, wait: bool) -> bool:
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if not wait:
                message = f"{path} is being written by another process; is a second one running in {path.parent}?"
                raise BlockingIOError(error.errno, message) from None
            print(f"waiting for another process that uses {path}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if (device := os.fstat(file.fileno()).st_dev) not in TOLD:
            TOLD.add(device)
            print(f"no locks in {path.parent} ({error.strerror}): do not start the same step twice at a time, and "
                  "remove yourself what killed ones leave (.NAME.tmp-...)", flush=True)  # fmt: skip
        return False
    return True


def _same(file: IO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except OSError:  # it has gone
        return False
