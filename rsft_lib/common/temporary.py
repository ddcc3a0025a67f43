"""What is being written beside its final name: under a name of its own, locked, and gone when its writer is.

No two processes share a temporary name. It is locked before it is made and until it is gone, so one that was killed
leaves it with a lock that nobody holds, and the next writer of the same final name removes both. On a file system
without locks nothing is removed.
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
    """Yield a new empty file or folder beside `final`, which is removed at the end if it still has its name."""
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
    with ExitStack() as stack:
        if not folder.parent.exists():
            stack.callback(_remove_empty, folder.parent)
        held = None
        while held is None:
            with suppress(FileNotFoundError):  # another process has removed the parent that it had made
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
        left = lock.with_suffix("")
        with suppress(OSError), locked(left, wait=False) as held:  # else it is somebody's
            if held:
                remove(left)


def remove(path: Path) -> None:
    """Remove a file or folder, its content first: whoever failed to fill it may hold files open, and so their space."""
    is_folder = path.is_dir() and not path.is_symlink()
    for file in path.rglob("*") if is_folder else [path]:
        with suppress(OSError):
            found = file.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # and so nobody else's
                os.truncate(file, 0)
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
