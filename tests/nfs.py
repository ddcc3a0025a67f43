"""Locks as Linux has them on NFS: only what is open for writing can be locked, so never a folder."""

import errno
import fcntl
import os

real = fcntl.flock


def flock(file, how: int) -> None:
    """In place of `fcntl.flock`."""
    descriptor = file if isinstance(file, int) else file.fileno()
    if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(descriptor, how)
