"""A folder that is either whole or not there: written beside its final name, listed in a manifest, renamed."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


@contextmanager
def new_folder(final: Path, facts: dict) -> Iterator[Path]:
    """Yield a temporary folder to fill; when the block ends well it becomes `final`, else it is removed.

    `facts` is what the manifest tells besides the files: at least `made_by`, the step that wrote it. It is
    read when the block ends, so the block may still add to it. A folder that this kit made before is
    replaced in one move; any other existing folder is refused.

    Raises:
        FileExistsError: `final` exists and is not the output of the same step.
    """
    final = Path(final)
    _refuse_foreign(final, facts["made_by"])
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        publish(temporary, final, facts)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, final: Path, facts: dict) -> None:
    """List a filled folder in its manifest and give it its final name, in place of what had it before."""
    _refuse_foreign(final, facts["made_by"])
    write_manifest(temporary, facts)
    _replace(temporary, final)


def write_manifest(folder: Path, facts: dict) -> None:
    """Flush every file of `folder` to disk and list it, with size in bytes and SHA-256, in `manifest.json`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_json(folder / MANIFEST, {**facts, "files": files})
    _fsync(folder)


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder.

    Raises:
        FileNotFoundError: the folder holds none, so no step of this kit finished it.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} was not finished; run the step that makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def verify(folder: Path) -> dict:
    """Check every file of `folder` against its manifest, and return the manifest.

    Raises:
        FileNotFoundError: no manifest, or a listed file is missing.
        ValueError: a file has another size or content than when it was written.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is listed in {MANIFEST} but missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes, {MANIFEST} says {expected['bytes']}: it is damaged")
        if file_hash(path) != expected["sha256"]:
            raise ValueError(f"{path} does not have the SHA-256 in {MANIFEST}: it is damaged or was edited")
    return manifest


def newest(run: Path) -> Path | None:
    """The last checkpoint `iter_*` of a run folder that is whole, or None; damaged ones are named and passed over."""
    for folder in sorted(Path(run).glob("iter_*"), reverse=True):
        try:
            verify(folder)
            return folder
        except (OSError, ValueError) as error:
            print(f"stepping back: {error}", flush=True)
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Write `value` as JSON in one move: readers see the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _refuse_foreign(final: Path, made_by: str) -> None:
    if not final.exists():
        return
    manifest = final / MANIFEST
    if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("made_by") == made_by:
        return
    raise FileExistsError(f"{final} exists and was not written by {made_by}: choose another folder or remove it")


def _replace(temporary: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old-{uuid.uuid4().hex[:8]}")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
