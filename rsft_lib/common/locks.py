"""Locks between processes on one or several machines: a `.lock` file beside the path, present while the lock is held.

The lock file is opened for writing, which NFS requires (so NFS cannot lock folders). A killed process leaves the file
behind, unlocked.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # unsupported by a file system
REPORTED: set[int] = set()  # st_dev of the file systems already reported to lack locks


def lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file or folder, which need not exist; yields False if the file system has no locks.

    Raises:
        BlockingIOError: another process holds the lock and `wait` is False.
    """
    lock = lock_file(path)
    made = not lock.exists()
    while True:
        with lock.open("a+") as file:
            held = _take(file, path, wait)
            if held and not _is_same_file(file, lock):
                continue  # the previous holder removed the lock file; another process may have created a new one
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
        if (device := os.fstat(file.fileno()).st_dev) not in REPORTED:
            REPORTED.add(device)
            print(f"no locks in {path.parent} ({error.strerror}): do not start the same step twice at a time, and "
                  "remove leftovers of killed processes (.NAME.tmp-...) by hand", flush=True)  # fmt: skip
        return False
    return True


def _is_same_file(file: IO, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except OSError:  # removed
        return False
