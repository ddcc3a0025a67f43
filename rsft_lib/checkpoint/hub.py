"""Models by name: a folder that is there, or a download from the Hugging Face Hub, whole and checked."""

import errno
import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.hf_api import ModelInfo

from rsft_lib.common.artifact import MANIFEST, file_hash, publish, read_manifest, require_space
from rsft_lib.common.paths import ROOT, existing, folder_name, resolve
from rsft_lib.common.temporary import alone

CHECKPOINTS = ROOT / "assets" / "checkpoints"
CONFIG = "config.json"
DESCRIBING = re.compile(r"[^/]+\.(json|jinja|model|txt)")
WEIGHTS = [  # the first kind that a repository has, as transformers takes it; no code, and no second copy
    re.compile(r"model\.safetensors"),
    re.compile(r"model-\d+-of-\d+\.safetensors"),
    re.compile(r"pytorch_model\.bin"),
    re.compile(r"pytorch_model-\d+-of-\d+\.bin"),
]


def model_folder(name: str, revision: str = "main", token: str | None = None) -> Path:
    """The folder of a Hugging Face model, downloaded to `assets/checkpoints/<org_name>` if need be.

    What was downloaded whole is used again without asking the Hub; a download that was cut off
    goes on with the files that are missing.

    Args:
        name: a folder (relative ones start at the project root), or a name on the Hub such as
            'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'.
        revision: branch, tag or commit on the Hub.
        token: for models that ask for one; HF_TOKEN of the environment, or that of `hf auth login`, by default.

    Raises:
        FileExistsError: the model's folder is there, but was not downloaded here.
        FileNotFoundError: there is no such folder, and no such name or revision can be had from the Hub.
        OSError: the disk has not enough space.
        ValueError: the repository holds no weights that can be read, or a model that this kit cannot train, or a file
            came over damaged.
    """
    if resolve(name).is_dir():
        return resolve(name)
    if name.count("/") > 1 or Path(name).is_absolute():  # no name on the Hub is
        existing(name, "model folder")
    folder = CHECKPOINTS / folder_name(name)
    if not _downloaded(folder, name, revision):
        with alone(_unfinished(folder)):
            if not _downloaded(folder, name, revision):
                _download(name, revision, token, folder)
    return folder


def _unfinished(folder: Path) -> Path:
    """Where a download lies until it is whole: always the same, so that it can go on."""
    return folder.with_name(f".{folder.name}.download")


def _downloaded(folder: Path, name: str, revision: str) -> bool:
    if not folder.exists():
        return False
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} was not downloaded by this kit: name it instead of {name!r}, or remove it")
    manifest = read_manifest(folder)
    same = manifest.get("name") == name and revision in (manifest["revision"], manifest["commit"])
    files = ((folder / file, listed["bytes"]) for file, listed in manifest["files"].items())
    return same and all(path.is_file() and path.stat().st_size == size for path, size in files)


def _download(name: str, revision: str, token: str | None, folder: Path) -> None:
    """Fetch the files that are needed beside their final place, check them, and move them there at once."""
    temporary = _unfinished(folder)
    with _told_plainly(name, revision):
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
    files = _needed(info)

    def fetch(names: list[str]) -> None:  # exactly these, of exactly this commit
        with _told_plainly(name, revision):
            patterns = [glob.escape(file) for file in names]
            snapshot_download(name, revision=info.sha, local_dir=temporary, allow_patterns=patterns, token=token)

    fetch([CONFIG])
    _refuse_what_cannot_be_trained(name, temporary)
    require_space(folder, sum(sibling.size or 0 for sibling in info.siblings if sibling.rfilename in files))
    fetch(files)
    listing = _checked(temporary, info, files)
    for path in temporary.iterdir():  # the library's own notes, and files of an attempt at another revision
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    facts = {"made_by": "download", "name": name, "revision": revision, "commit": info.sha, "files": listing}
    publish(temporary, folder, facts)


def _refuse_what_cannot_be_trained(name: str, folder: Path) -> None:
    """Read the config that was fetched, before gigabytes of weights are.

    Raises:
        ValueError: this kit cannot train such a model; the folder is gone then.
    """
    from rsft_lib.model.config import read_config  # imports megatron-core, which takes seconds

    try:
        read_config(folder)
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{name!r} was not downloaded from the Hub: {error}") from None


@contextmanager
def _told_plainly(name: str, revision: str) -> Iterator[None]:
    """The library raises many kinds of errors; all but a full disk mean that the model cannot be had."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise FileNotFoundError(
            f"{name!r} is no folder under {ROOT}, and revision {revision!r} of it could not be downloaded from the Hub "
            f"({error}); check the name and the network, and set HF_TOKEN for a model that asks for it"
        ) from error


def _needed(info: ModelInfo) -> list[str]:
    names = [sibling.rfilename for sibling in info.siblings]
    if CONFIG not in names:
        raise ValueError(f"{info.id!r} on the Hub has no {CONFIG}: it is not a transformers model")
    for kind in WEIGHTS:
        weights = [name for name in names if kind.fullmatch(name)]
        if weights:
            return weights + [name for name in names if DESCRIBING.fullmatch(name)]
    raise ValueError(f"{info.id!r} on the Hub has no model.safetensors and no pytorch_model.bin, whole or sharded")


def _checked(folder: Path, info: ModelInfo, files: list[str]) -> dict[str, dict]:
    """The files' entries in a manifest; those of which the Hub tells the SHA-256 must have it."""
    listing = {}
    for sibling in info.siblings:
        if sibling.rfilename not in files:
            continue
        path = folder / sibling.rfilename
        found = file_hash(path)
        if sibling.lfs and found != sibling.lfs.sha256:
            path.unlink()
            raise ValueError(f"{path} came over damaged: its SHA-256 is not the one the Hub tells; try again")
        listing[sibling.rfilename] = {"bytes": path.stat().st_size, "sha256": found}
    return listing
