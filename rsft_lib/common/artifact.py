"""Atomic output folders: written under a temporary name, listed in a manifest, then renamed."""

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rsft_lib.common.cores import usable_cores
from rsft_lib.common.disk import explain_full_disk, require_space
from rsft_lib.common.temporary import beside, new_file

MANIFEST = "manifest.json"
WRITERS = min(4, usable_cores())  # files hashed or written concurrently
VERIFICATION, README = "verify.json", "README.md"
FOR_READERS = {VERIFICATION, README}  # may be added to or edited in a finished folder; no step depends on them
# Files that steps leave beside their output folder; they lie inside another output where outputs are nested.
SIDE_FILES = re.compile(r".*\.rejected\.jsonl|\..*\.(tmp|old)-[0-9a-f]{8}(\.lock)?")
TOOL_FILES = re.compile(r"\.ipynb_checkpoints|__pycache__|\.DS_Store|\.nfs[0-9a-f]+")  # .nfs: deleted but still open


class DamagedError(ValueError):
    """A file differs from the manifest of its folder."""


@contextmanager
def new_folder(
    final: Path,
    facts: dict,
    size: int = 0,
    source: Collection[str] = (),
    overwrite: bool = False,
    estimate: Callable[[int], int] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `final` if the block succeeds, and removed otherwise.

    `facts` are the manifest's entries besides the file list, at least `made_by`, the step that writes the folder. They
    are read when the block ends, so the block may add to them. Entries in `facts["files"]` are trusted; all other
    files are hashed. A previous output of the same step from the same source is replaced once the new one is complete;
    any other existing folder is refused, and so is one that contains files this kit did not write.

    Args:
        size: bytes that will be written, if known.
        source: keys of `facts` that identify the inputs. The value is either a name, optionally with the hash of its
            content under the key with `_sha256` appended, or a dict of name -> hash.
        overwrite: also replace a folder made from another source or containing foreign files.
        estimate: maps bytes written so far to the expected total, where `size` is not known; called if the disk is
            full.

    Raises:
        FileExistsError: `final` exists and was written by another step or from another source, or contains files
            that no step wrote.
        OSError: the disk has less than `size` bytes free, or fills up before the block ends.
    """
    final = Path(final)
    _put_back(final)
    refuse_other(final, facts, source, overwrite)
    require_space(final, size)
    final.parent.mkdir(parents=True, exist_ok=True)
    with beside(final, folder=True) as temporary, explain_full_disk(final, temporary, estimate or (lambda _: size)):
        yield temporary
        publish(temporary, final, facts, source, overwrite)


def publish(temporary: Path, final: Path, facts: dict, source: Collection[str] = (), overwrite: bool = False) -> None:
    """Write the manifest of a filled folder and rename the folder to `final`, replacing any previous one."""
    refuse_other(final, facts, source, overwrite)
    write_manifest(temporary, facts)
    _replace(temporary, final)


def refuse_other(final: Path, facts: dict, source: Collection[str] = (), overwrite: bool = False) -> None:
    """Check that an existing `final` may be replaced; see `new_folder`.

    Raises:
        FileExistsError: it may not be replaced.
    """
    try:
        stat_before = final.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        before = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        same_step = before["made_by"] == facts["made_by"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        same_step = False  # no manifest, or an unreadable one
    if not same_step:
        if _was_replaced(final, stat_before):
            return refuse_other(final, facts, source, overwrite)
        raise FileExistsError(
            f"{final} exists and was not written by {facts['made_by']}: choose another folder or remove it"
        )
    for name in () if overwrite else source:
        (old, old_hashes), (new, new_hashes) = _source_of(before, name), _source_of(facts, name)
        if old != new and not (new_hashes and old_hashes == new_hashes):
            raise FileExistsError(
                f"{final} was made from {' and '.join(old) or 'an unknown source'} and is not replaced by output made "
                f"from {' and '.join(new) or f'no {name}'}: choose another `output`, or set `overwrite` to replace it"
            )
    if overwrite or not (others := foreign(final)):
        return
    if _was_replaced(final, stat_before):
        return refuse_other(final, facts, source, overwrite)
    listed = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
    raise FileExistsError(
        f"{final} is not replaced: it contains files that {facts['made_by']} did not write: {listed}. Move them, "
        "choose another `output`, or set `overwrite` to delete them"
    )


def _was_replaced(final: Path, before: os.stat_result) -> bool:
    """Whether another process has replaced the folder since `before` was taken."""
    return not (final.exists() and os.path.samestat(before, final.stat()))


def _source_of(facts: dict, name: str) -> tuple[list[str], list[str]]:
    """(names of a source, content hashes if all are known) from `facts`; empty lists if the entry is malformed."""
    value, content = facts.get(name), facts.get(f"{name}_sha256")
    hashes = value if isinstance(value, dict) else {value: content} if isinstance(value, str) and value else {}
    if not all(isinstance(text, str | None) for text in hashes.values()):
        return [], []
    return sorted(hashes), sorted(hashes.values()) if all(hashes.values()) else []


def foreign(folder: Path) -> list[str]:
    """Names of the files in a folder that no step of this kit wrote; nested output folders of this kit are allowed.

    Only names are compared: an edited file that the manifest lists does not count as foreign.
    """
    return sorted(_foreign(Path(folder), Path(folder), _listed(folder)))


def _foreign(place: Path, root: Path, listed: set[str]) -> Iterator[str]:
    with suppress(FileNotFoundError, NotADirectoryError):  # removed by another writer
        for path in place.iterdir():
            name = path.relative_to(root).as_posix()
            if name in listed or TOOL_FILES.fullmatch(path.name) or SIDE_FILES.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from _foreign(path, root, {f"{name}/{nested}" for nested in _listed(path)} or listed)
            else:
                yield name


def _listed(folder: Path) -> set[str]:
    """Names of the files expected in a folder that a step of this kit wrote; empty for any other folder."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {*manifest["files"], MANIFEST, *FOR_READERS} if "made_by" in manifest else set()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def write_manifest(folder: Path, facts: dict) -> None:
    """Flush every file of `folder` to disk and list it in `manifest.json` with its size in bytes and SHA-256.

    Those for readers (FOR_READERS) are not listed.
    `manifest_sha256` is the hash of the manifest's own text without that entry.
    """
    names, known = [name for name in _files(folder) if name not in FOR_READERS], facts.get("files", {})
    for name in names:
        _fsync(folder / name)
    hashes = _hashes(folder, [name for name in names if name not in known])
    files = {
        name: known.get(name) or {"bytes": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names
    }
    content = {**facts, "files": files}
    write_json(folder / MANIFEST, content | {"manifest_sha256": _own_hash(content)})
    for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _fsync(directory)


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: the folder has none: no step of this kit completed it.
        DamagedError: the manifest is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is incomplete; run the step that makes it")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        own_hash = content.pop("manifest_sha256")
        if own_hash != _own_hash(content) or text != _json(content | {"manifest_sha256": own_hash}):
            raise ValueError("its text does not match manifest_sha256")
        if not isinstance(content["files"], dict):
            raise TypeError("it has no list of files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DamagedError(
            f"{path} is damaged or was edited ({error}); run the step that makes {folder} again"
        ) from error
    return content


def verify(folder: Path, only: Collection[str] | None = None) -> dict:
    """Check every file of `folder` against its manifest, and return the manifest.

    Args:
        only: names of the files to hash; for the others only the size is checked. All files by default.

    Raises:
        FileNotFoundError: the manifest or a listed file is missing.
        DamagedError: the size or content of a file differs from the manifest, or a file is not listed.
    """
    folder = Path(folder)
    manifest, present = read_manifest(folder), _files(folder)
    for name, expected in manifest["files"].items():
        if name not in present:
            raise FileNotFoundError(f"{folder / name} is listed in {MANIFEST} but missing")
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise DamagedError(
                f"{folder / name} has {size} bytes, expected {expected['bytes']} ({MANIFEST}): it is damaged"
            )
    foreign = set(present) - manifest["files"].keys() - FOR_READERS
    if foreign:
        raise DamagedError(f"{folder / min(foreign)} is not listed in {MANIFEST}: it was added later; remove it")
    verify_files(folder, manifest["files"] if only is None else only)
    return manifest


def verify_files(folder: Path, names: Collection[str]) -> None:
    """Check the hashes of the files `names` against the manifest of `folder`.

    Raises:
        DamagedError: the content of a file differs from the manifest, or a file is not listed.
    """
    with verification(folder, sorted(names)) as verified:
        for name in sorted(names):
            verified(name)


@contextmanager
def verification(folder: Path, names: Iterable[str]) -> Iterator[Callable[[str], None]]:
    """Hash the files `names` of `folder` in threads, in this order, while the block runs.

    Yields a function that waits until a file is hashed, and raises a DamagedError if it differs from the manifest.
    """
    listed = read_manifest(folder)["files"]
    with ThreadPoolExecutor(WRITERS) as threads:
        tasks = {name: threads.submit(_verify_file, Path(folder), name, listed) for name in names}
        try:
            yield lambda name: tasks[name].result()
        finally:
            threads.shutdown(cancel_futures=True)


def _verify_file(folder: Path, name: str, listed: dict[str, dict]) -> None:
    if name not in listed:
        raise DamagedError(f"{folder / name} is not listed in {MANIFEST}: it was added later")
    if file_hash(folder / name) != listed[name]["sha256"]:
        raise DamagedError(f"{folder / name} does not match the SHA-256 in {MANIFEST}: it is damaged or was edited")


def own_manifest(folder: Path) -> dict:
    """The manifest of a folder that this kit wrote; empty for another, also with another tool's `manifest.json`.

    Raises:
        ValueError: the manifest is this kit's, and damaged.
    """
    try:
        content = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read_manifest(folder) if isinstance(content, dict) and "manifest_sha256" in content else {}


def reusable(
    folder: Path, facts: dict, *, nested: bool = False, unchanged: Callable[[], bool] = lambda: True
) -> dict | None:
    """The manifest of an intact folder that was made with the same `facts`; None if it has to be made.

    Args:
        facts: names and values that its manifest must have.
        nested: whether other steps may have written into the folder, so that only the files listed are checked.
        unchanged: a further comparison, made last.
    """
    try:
        manifest = read_manifest(folder)
        if any(manifest.get(name) != value for name, value in facts.items()):
            return None
        verify_files(folder, manifest["files"]) if nested else verify(folder)
        if not unchanged():
            return None
    except (OSError, ValueError) as error:
        if (folder / MANIFEST).is_file():
            print(f"{folder} is made again: {error}")
        return None
    print(f"{folder} already exists, made from the same inputs")
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON atomically: readers see the old file or the complete new one."""
    with new_file(path) as file:
        file.write(_json(value))


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _own_hash(content: dict) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    """Names of all files of a folder except its manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Name -> SHA-256; in threads, since hashing releases the GIL."""
    with ThreadPoolExecutor(WRITERS) as threads:
        return dict(zip(names, threads.map(file_hash, (folder / name for name in names)), strict=True))


def _replace(temporary: Path, final: Path) -> None:
    """Rename a folder to `final` in one step, or in two where the file system cannot exchange names (NFS).

    A process killed between the two leaves `.NAME.old-XXXXXXXX`, which the next writer of this name restores.
    """
    if not (final.exists() and _swapped(temporary, final)):
        _take_name(temporary, final)
    _fsync(final.parent)
    _delete(temporary)  # the previous folder, if the names were exchanged
    _put_back(final)


def _swapped(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False if the kernel or the file system does not support it."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    current_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return (
        rename is not None
        and rename(current_directory, os.fsencode(one), current_directory, os.fsencode(other), exchange) == 0
    )


def _take_name(temporary: Path, final: Path) -> None:
    while True:
        with suppress(FileNotFoundError):  # it does not exist, or another writer has just moved it
            final.rename(final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}"))
        try:
            temporary.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # these mean that another writer was faster
                _put_back(final)
                raise


def _put_back(final: Path) -> None:
    """Restore a folder that an interrupted writer moved aside; remove it if `final` exists."""
    for old in final.parent.glob(f".{glob.escape(final.name)}.old-????????"):
        with suppress(OSError):  # another writer was faster
            if final.exists() or not (old / MANIFEST).is_file():
                _delete(old)
            else:
                old.rename(final)


def _delete(folder: Path) -> None:
    """Remove a folder, its manifest first, so that a partial one is never restored. Links are not followed."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
