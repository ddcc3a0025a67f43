"""A folder that is either whole or not there: written beside its final name, listed in a manifest, renamed."""

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from rsft_lib.common.cores import usable_cores
from rsft_lib.common.disk import full_disk_told, require_space
from rsft_lib.common.paths import existing
from rsft_lib.common.temporary import beside, new_file

MANIFEST = "manifest.json"
WRITERS = min(4, usable_cores())  # files that are hashed or written at a time
PROOF = "verify.json"  # may be laid into a finished folder; no step reads it
# What the steps leave beside a folder, and so within one that holds others, such as tokens in that of their dataset.
BESIDE = re.compile(r".*\.rejected\.jsonl|\..*\.(tmp|old)-[0-9a-f]{8}(\.lock)?")
OF_TOOLS = re.compile(r"\.ipynb_checkpoints|__pycache__|\.DS_Store|\.nfs[0-9a-f]+")  # the last is of NFS


@contextmanager
def new_folder(
    final: Path,
    facts: dict,
    size: int = 0,
    source: Collection[str] = (),
    overwrite: bool = False,
    estimate: Callable[[int], int] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends well it becomes `final`, else it is removed.

    `facts` is what the manifest tells besides the files: at least `made_by`, the step that wrote it. It is
    read when the block ends, so the block may still add to it; `files` in it are taken as they are listed, those
    missing there are hashed. What the same step made before of the same source is replaced when the new one is whole;
    any other existing folder is refused, and so is one into which somebody else has put files.

    Args:
        size: bytes that will be written, if known.
        source: names of the facts that tell what the folder is made from: a name, whose content may have its hash in
            another fact with `_sha256` appended, or names with their hashes.
        overwrite: replace what was made from another source or holds files of somebody else, too.
        estimate: where `size` is not known, bytes that the whole will take, from those that are written; asked for
            when the disk is full.

    Raises:
        FileExistsError: `final` exists and is not the output of the same step, was not made from the same source, or
            holds files that no step wrote.
        OSError: the disk has not `size` bytes left, or is full before the block ends.
    """
    final = Path(final)
    _put_back(final)
    refuse_other(final, facts, source, overwrite)
    require_space(final, size)
    final.parent.mkdir(parents=True, exist_ok=True)
    with beside(final, folder=True) as temporary, full_disk_told(final, temporary, estimate or (lambda _: size)):
        yield temporary
        publish(temporary, final, facts, source, overwrite)


def publish(temporary: Path, final: Path, facts: dict, source: Collection[str] = (), overwrite: bool = False) -> None:
    """List a filled folder in its manifest and give it its final name, in place of what had it before."""
    refuse_other(final, facts, source, overwrite)
    write_manifest(temporary, facts)
    _replace(temporary, final)


def refuse_other(final: Path, facts: dict, source: Collection[str] = (), overwrite: bool = False) -> None:
    """Check that what has the name `final` may be replaced; see `new_folder`.

    Raises:
        FileExistsError: it may not.
    """
    try:
        there = final.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        before = json.loads((final / MANIFEST).read_text(encoding="utf-8"))
        same_step = before["made_by"] == facts["made_by"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        same_step = False  # no manifest, or one that tells nothing
    if not same_step:
        if _is_another(final, there):
            return refuse_other(final, facts, source, overwrite)
        raise FileExistsError(
            f"{final} exists and was not written by {facts['made_by']}: choose another folder or remove it"
        )
    for name in () if overwrite else source:
        (old, old_content), (new, content) = _named(before, name), _named(facts, name)
        if old != new and not (content and old_content == content):
            raise FileExistsError(
                f"{final} was made from {' and '.join(old) or 'something else'} and is not replaced by what is made "
                f"from {' and '.join(new) or f'no {name}'}: choose another `output`, or set `overwrite` to replace it"
            )
    if overwrite or not (others := foreign(final)):
        return
    if _is_another(final, there):
        return refuse_other(final, facts, source, overwrite)
    listed = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
    raise FileExistsError(
        f"{final} is not replaced, since it holds what {facts['made_by']} did not write: {listed}. Move that away, "
        "choose another `output`, or set `overwrite` to lose it"
    )


def _is_another(final: Path, before: os.stat_result) -> bool:
    """Whether another writer has replaced a folder meanwhile."""
    return not (final.exists() and os.path.samestat(before, final.stat()))


def _named(facts: dict, name: str) -> tuple[list[str], list[str]]:
    """(names of a source, hashes of its content where all are known) as facts have them; nothing of a damaged one."""
    found, content = facts.get(name), facts.get(f"{name}_sha256")
    known = found if isinstance(found, dict) else {found: content} if isinstance(found, str) and found else {}
    if not all(isinstance(text, str | None) for text in known.values()):
        return [], []
    return sorted(known), sorted(known.values()) if all(known.values()) else []


def foreign(folder: Path) -> list[str]:
    """Names of the files in a folder that no step of this kit wrote; whole folders of this kit may lie in it.

    Files that are listed may have been edited since: nothing is hashed.
    """
    return sorted(_foreign(Path(folder), Path(folder), _listed(folder)))


def _foreign(place: Path, root: Path, listed: set[str]) -> Iterator[str]:
    with suppress(FileNotFoundError, NotADirectoryError):  # removed by another writer
        for path in place.iterdir():
            name = path.relative_to(root).as_posix()
            if name in listed or OF_TOOLS.fullmatch(path.name) or BESIDE.fullmatch(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from _foreign(path, root, {f"{name}/{within}" for within in _listed(path)} or listed)
            else:
                yield name


def _listed(folder: Path) -> set[str]:
    """What may lie in a folder that a step of this kit wrote; nothing where none did."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {*manifest["files"], MANIFEST, PROOF} if "made_by" in manifest else set()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()


def write_manifest(folder: Path, facts: dict) -> None:
    """Flush every file of `folder` to disk and list it, with size in bytes and SHA-256, in `manifest.json`.

    `manifest_sha256` is the hash of the manifest's own text without that line.
    """
    names, known = _files(folder), facts.get("files", {})
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
        FileNotFoundError: the folder holds none, so no step of this kit finished it.
        ValueError: it is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} was not finished; run the step that makes it")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        own_hash = content.pop("manifest_sha256")
        if own_hash != _own_hash(content) or text != _json(content | {"manifest_sha256": own_hash}):
            raise ValueError("its text does not have the hash that it names")
        if not isinstance(content["files"], dict):
            raise TypeError("it lists no files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or was edited ({error}); run the step that makes {folder} again"
        ) from error
    return content


def verify(folder: Path, only: Collection[str] | None = None) -> dict:
    """Check every file of `folder` against its manifest, and return the manifest.

    Args:
        only: names of the files whose content will be used; of others only the size is checked.

    Raises:
        FileNotFoundError: no manifest, or a listed file is missing.
        ValueError: a file has another size or content than when it was written, or is not listed.
    """
    folder = Path(folder)
    manifest, present = read_manifest(folder), _files(folder)
    for name, expected in manifest["files"].items():
        if name not in present:
            raise FileNotFoundError(f"{folder / name} is listed in {MANIFEST} but missing")
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{folder / name} has {size} bytes, {MANIFEST} says {expected['bytes']}: it is damaged")
    foreign = set(present) - manifest["files"].keys() - {PROOF}
    if foreign:
        raise ValueError(f"{folder / min(foreign)} is not listed in {MANIFEST}: it was put there later; remove it")
    verify_files(folder, manifest["files"] if only is None else only)
    return manifest


def verify_files(folder: Path, names: Collection[str]) -> None:
    """Check the content of some files that the manifest of `folder` lists, and nothing else.

    Raises:
        ValueError: a file has another content than when it was written, or is not listed.
    """
    listed = read_manifest(folder)["files"]
    for name, found in _hashes(Path(folder), sorted(names)).items():
        if name not in listed:
            raise ValueError(f"{Path(folder) / name} is not listed in {MANIFEST}: it was put there later")
        if found != listed[name]["sha256"]:
            raise ValueError(f"{Path(folder) / name} has not the SHA-256 in {MANIFEST}: it is damaged or was edited")


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """The path of a run's checkpoint after `iteration` steps."""
    return Path(run) / f"iter_{iteration:07d}"


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints that a training wrote into its run folder, by step; only their manifests are read.

    Folders with another name, such as `iter_best` or `iter_0000009_backup`, or another manifest, are not checkpoints.
    """
    return [folder for folder in _named_as_checkpoints(run) if not _why_not(folder)]


def newest(run: Path) -> Path | None:
    """The last checkpoint of a run folder that is whole, or None; damaged ones are named and passed over."""
    for folder in reversed(_named_as_checkpoints(run)):
        try:
            if why := _why_not(folder):
                raise ValueError(why)
            verify(folder)
            return folder
        except (OSError, ValueError) as error:
            print(f"stepping back: {error}", flush=True)
    return None


def last_checkpoint(run: str | Path) -> Path:
    """The last checkpoint of a run folder that is whole.

    Raises:
        FileNotFoundError: there is no such folder, or none in it.
    """
    folder = existing(run, "run folder")
    if found := newest(folder):
        return found
    raise FileNotFoundError(f"{folder} has no whole checkpoint: run notebook 05_train, until it has saved one")


def _named_as_checkpoints(run: Path) -> list[Path]:
    steps = ((int(p.name[5:]), p) for p in Path(run).glob("iter_*") if p.name[5:].isdecimal() and p.is_dir())
    return [path for step, path in sorted(steps) if path == checkpoint_folder(run, step)]


def _why_not(folder: Path) -> str:
    """Why a folder named as a checkpoint is not the one that the training wrote after this step; "" if it is."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return str(error)
    found = manifest.get("made_by"), manifest.get("iteration")
    if found == ("train", int(folder.name[5:])):
        return ""
    return f"{folder} is not the checkpoint of this step: its manifest says {found[0]}, step {found[1]}"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON in one move: readers see the old file or the whole new one."""
    with new_file(path) as file:
        file.write(_json(value))


def _json(value: dict) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _own_hash(content: dict) -> str:
    return hashlib.sha256(_json(content).encode()).hexdigest()


def _files(folder: Path) -> list[str]:
    """Names of all files of a folder but its manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Name -> SHA-256; several files at a time, since hashing holds no lock."""
    with ThreadPoolExecutor(WRITERS) as threads:
        return dict(zip(names, threads.map(file_hash, (folder / name for name in names)), strict=True))


def _replace(temporary: Path, final: Path) -> None:
    """Give a folder its final name in one move, or, where a file system cannot swap names (NFS), in two.

    Whoever is killed between the two leaves `.NAME.old-XXXXXXXX`, which the next writer of this name puts back.
    """
    if not (final.exists() and _swapped(temporary, final)):
        _take_name(temporary, final)
    _fsync(final.parent)
    _delete(temporary)  # has what had the name before, if they were swapped
    _put_back(final)


def _swapped(one: Path, other: Path) -> bool:
    """Whether two names could be exchanged; False where Linux, or the file system, cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename) and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _take_name(temporary: Path, final: Path) -> None:
    while True:
        with suppress(FileNotFoundError):  # there is none, or another writer has just moved it
            final.rename(final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}"))
        try:
            temporary.rename(final)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another writer was faster
                _put_back(final)
                raise


def _put_back(final: Path) -> None:
    """Give what a writer moved away, and could not replace, its name again; what was replaced is removed."""
    for old in final.parent.glob(f".{glob.escape(final.name)}.old-????????"):
        with suppress(OSError):  # another writer was faster
            if final.exists() or not (old / MANIFEST).is_file():
                _delete(old)
            else:
                old.rename(final)


def _delete(folder: Path) -> None:
    """Remove a folder, its manifest first: without one it is never put back. Of a link, remove the link alone."""
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
