"""Room on a disk: asked for before something is written, and said afterwards where it was too little."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsft_lib.common.temporary import remove

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = 1 << 20  # bytes; a disk on which so many cannot be written is full


def require_space(final: Path, size: int) -> None:
    """Check that the disk on which `final` will lie has `size` bytes left.

    Raises:
        OSError: it has not.
    """
    there = _existing_parent(final)
    free = shutil.disk_usage(there).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{final} needs {told(size)}, {there} has {told(free)} left: free some space")


@contextmanager
def full_disk_told(final: Path, temporary: Path, needed: Callable[[int], int]) -> Iterator[None]:
    """Run a block that fills the folder `temporary`, which is to become `final`; remove it if the disk is full.

    Args:
        needed: bytes that the whole takes, from those that were written until then; 0 where nothing tells.

    Raises:
        OSError: the disk, or a quota, is full; it names `final`, what was written, is needed and is free.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, temporary):
            raise
        found = [path.stat() for path in temporary.rglob("*") if path.is_file()]
        written = sum(min(file.st_size, 512 * file.st_blocks) for file in found)  # a file may have gaps
        remove(temporary)
        there, whole = _existing_parent(final), needed(written)
        of_whole = f" of {told(whole)}" if whole else ""
        raise OSError(
            errno.ENOSPC,
            f"No space left on device, or in a quota: {final} was not made; {told(written)}{of_whole} were written and "
            f"are removed again, {told(shutil.disk_usage(there).free)} are free in {there} now. Free some space, "
            "or choose a folder on another disk",
        ) from error


def told(size: int) -> str:
    """Bytes as people say them.

    >>> told(25_300_000_000)
    '25.3 GB'
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether an error comes of a full disk, as some libraries (safetensors, NumPy, torch) do not say by a number."""
    chain: BaseException | None = error
    while chain:
        if isinstance(chain, OSError) and chain.errno in FULL:
            return True
        chain = chain.__cause__ or chain.__context__
    return not isinstance(error, ValueError) and not _can_write(folder)


def _can_write(folder: Path) -> bool:
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in FULL
    finally:
        probe.unlink(missing_ok=True)
    return True


def _existing_parent(final: Path) -> Path:
    return next(path for path in final.absolute().parents if path.exists())
