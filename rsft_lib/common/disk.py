"""Disk space: checked before writing, and reported in a clear error if the disk fills up."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rsft_lib.common.temporary import remove

FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = 1 << 20  # bytes; a disk that cannot take this many counts as full


def require_space(final: Path, size: float) -> None:
    """Check that the disk of `final` has `size` bytes free.

    Raises:
        OSError: it has less.
    """
    parent = _existing_parent(final)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"{final} needs {format_size(size)}, {parent} has {format_size(free)} left: free some space",
        )


@contextmanager
def explain_full_disk(final: Path, temporary: Path, needed: Callable[[int], int]) -> Iterator[None]:
    """Run a block that fills the folder `temporary`, later renamed to `final`; if the disk is full, remove it.

    Args:
        needed: maps bytes written so far to the expected total; 0 if unknown.

    Raises:
        OSError: the disk or a quota is full; the message has `final` and the bytes written, needed and free.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error, temporary):
            raise
        files = [path.stat() for path in temporary.rglob("*") if path.is_file()]
        written = sum(min(file.st_size, 512 * file.st_blocks) for file in files)  # a file may be sparse
        remove(temporary)
        parent, total = _existing_parent(final), needed(written)
        of_total = f" of {format_size(total)}" if total else ""
        raise OSError(
            errno.ENOSPC,
            f"No space left on device, or disk quota exceeded: {final} was not made; {format_size(written)}{of_total} "
            f"were written and have been removed, {format_size(shutil.disk_usage(parent).free)} are free in {parent} "
            "now. Free some space, or choose a folder on another disk",
        ) from error


def format_size(size: float) -> str:
    """A number of bytes in MB or GB.

    >>> format_size(25_300_000_000)
    '25.3 GB'
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _is_full(error: Exception, folder: Path) -> bool:
    """Whether a full disk caused an error; some libraries (safetensors, NumPy, torch) raise it without an errno."""
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
