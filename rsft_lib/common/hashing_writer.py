"""Write and hash a large file in one pass."""

import errno
import fcntl
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

BUFFER = 16 * 2**20  # bytes per write
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux only


class HashedFile:
    """A large file whose SHA-256 is computed while it is written, so that nothing is read again.

    Two threads hash and write one buffer while the next is filled. Writes bypass the page cache (O_DIRECT) where the
    file system supports it: filling the cache takes longer than hashing.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self._descriptor = _open_around_cache(path)
        # Anonymous maps are page-aligned, as O_DIRECT requires.
        # numpy copies into them without holding the GIL, which training needs meanwhile.
        self._buffers, self._filled = [np.frombuffer(mmap.mmap(-1, BUFFER), np.uint8) for _ in range(2)], 0
        self._digest, self._threads = hashlib.sha256(), ThreadPoolExecutor(2)
        self._pending: list[Future] = []

    def write(self, data) -> int:
        """Append any object that supports the buffer protocol; return its size in bytes."""
        left = data = np.frombuffer(data, np.uint8)
        while len(left):
            count = min(len(left), BUFFER - self._filled)
            self._buffers[0][self._filled : self._filled + count] = left[:count]
            self._filled += count
            left = left[count:]
            if self._filled == BUFFER:
                self._drain()
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch.save calls it. `close` writes everything."""

    def close(self) -> None:
        """Write the rest and flush the file to disk."""
        try:
            self._drain()
            self._wait()
            os.fsync(self._descriptor)
        finally:
            self._threads.shutdown()
            os.close(self._descriptor)

    def listing(self) -> dict[str, dict]:
        """The manifest entry of the closed file, for `facts["files"]`."""
        return {self.path.name: {"bytes": self.size, "sha256": self._digest.hexdigest()}}

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _drain(self) -> None:
        self._wait()
        full = self._buffers[0][: self._filled]
        self._pending = [self._threads.submit(use, full) for use in (self._digest.update, self._append)]
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        for pending in self._pending:
            pending.result()

    def _append(self, data: np.ndarray) -> None:
        while len(data):
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:  # O_DIRECT rejects an unaligned tail, and on some systems every write
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & O_DIRECT:
                    raise
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~O_DIRECT)


def _open_around_cache(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
