"""What a notebook records in its `status.json`: parameters, those given by hand, and the identity of each input."""

import hashlib
import json
from pathlib import Path

from rsft_lib.checkpoint.run_checkpoints import checkpoints
from rsft_lib.common.artifact import MANIFEST, file_hash, own_manifest
from rsft_lib.common.paths import resolve

STATUS_FILE = "status.json"
HASHED = 2**26
INPUTS = {  # parameters that name an input
    "model", "template", "long", "short", "hybrid", "tokenizer", "data", "checkpoint", "eval_data", "runs", "run",
    "held_out", "before", "short_model", "questions", "evaluation", "eval_questions", "eval_more",
}  # fmt: skip


def identities(parameters: dict) -> dict[str, str]:
    """Parameter -> identity of the file or folder that it names, for those that exist."""
    named = {name: identity(value) for name, value in parameters.items() if name in INPUTS and isinstance(value, str)}
    return {name: found for name, found in named.items() if found}


def identity(path: str) -> str:
    """A hash that changes with the content of a file or folder; empty if there is none.

    That of a folder of this kit is its manifest's, that of a run its newest checkpoint's. Elsewhere only files of up to
    `HASHED` bytes are read, and of larger ones, such as weights, the size and the time of the last change are compared.
    Of comma-separated paths, also as `name -> path`, it is the hashes one after the other.
    """
    place = resolve(path)
    if ("," in path or "->" in path) and not place.exists():
        return "".join(identity(part.rpartition("->")[2].strip()) for part in path.split(","))
    if not path or not place.exists():
        return ""
    saved = checkpoints(place)
    folder = saved[-1] if saved else place
    if own_manifest(folder):
        return file_hash(folder / MANIFEST)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    listed = [(path.relative_to(place).as_posix(), *_content(path)) for path in files]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _content(file: Path) -> tuple[int, int | str]:
    status = file.stat()
    return status.st_size, file_hash(file) if status.st_size <= HASHED else status.st_mtime_ns
