"""File locks like those of Linux on NFS: only files opened for writing can be locked, never folders."""

import errno
import fcntl
import os

real = fcntl.flock


def flock(file, how: int) -> None:
    """Replacement of `fcntl.flock`."""
    descriptor = file if isinstance(file, int) else file.fileno()
    if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    real(descriptor, how)
