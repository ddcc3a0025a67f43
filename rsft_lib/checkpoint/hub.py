"""Resolve a model name: an existing folder, or a complete and verified download from the Hugging Face Hub."""

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
from rsft_lib.common.paths import folder_name, require_path, resolve
from rsft_lib.common.temporary import alone
from rsft_lib.model.config import read_config

CHECKPOINTS = Path("assets") / "checkpoints"
CONFIG = "config.json"
DESCRIBING = re.compile(r"[^/]+\.(json|jinja|model|txt)")
WEIGHTS = [  # by the precedence of transformers; only the first match is downloaded
    re.compile(r"model\.safetensors"),
    re.compile(r"model-\d+-of-\d+\.safetensors"),
    re.compile(r"pytorch_model\.bin"),
    re.compile(r"pytorch_model-\d+-of-\d+\.bin"),
]


def model_folder(name: str, revision: str = "main") -> Path:
    """The folder of a Hugging Face model, downloaded to `assets/checkpoints/<org_name>` if necessary.

    A complete download is reused without contacting the Hub; an interrupted one resumes with the missing files. A
    gated model needs HF_TOKEN in the environment, or `hf auth login`.

    Args:
        name: a folder, or a name on the Hub such as
            'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'.
        revision: branch, tag or commit on the Hub.

    Raises:
        FileExistsError: the target folder exists, but was not downloaded by this kit.
        FileNotFoundError: there is no such folder, and the model or revision cannot be downloaded from the Hub.
        OSError: the disk has too little space.
        ValueError: the repository has no readable weights or a model that this kit cannot train, or a downloaded file
            is damaged.
    """
    if resolve(name).is_dir():
        return resolve(name)
    if name.count("/") > 1 or Path(name).is_absolute():  # not a name on the Hub
        require_path(name, "model folder")
    folder = resolve(CHECKPOINTS / folder_name(name))
    if not _downloaded(folder, name, revision):
        with alone(_unfinished(folder)):
            if not _downloaded(folder, name, revision):
                _download(name, revision, folder)
    return folder


def _unfinished(folder: Path) -> Path:
    """The folder of an incomplete download; always the same one, so that it can be resumed."""
    return folder.with_name(f".{folder.name}.download")


def _downloaded(folder: Path, name: str, revision: str) -> bool:
    if not folder.exists():
        return False
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(f"{folder} was not downloaded by this kit: pass it instead of {name!r}, or remove it")
    manifest = read_manifest(folder)
    same = manifest.get("name") == name and revision in (manifest["revision"], manifest["commit"])
    files = ((folder / file, listed["bytes"]) for file, listed in manifest["files"].items())
    return same and all(path.is_file() and path.stat().st_size == size for path, size in files)


def _download(name: str, revision: str, folder: Path) -> None:
    """Download the required files into a temporary folder, verify them, and rename it to `folder`."""
    temporary = _unfinished(folder)
    with _download_errors(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = _needed(info)

    def fetch(names: list[str]) -> None:
        with _download_errors(name, revision):
            patterns = [glob.escape(file) for file in names]
            snapshot_download(name, revision=info.sha, local_dir=temporary, allow_patterns=patterns)

    fetch([CONFIG])
    _refuse_what_cannot_be_trained(name, temporary)
    require_space(folder, sum(sibling.size or 0 for sibling in info.siblings if sibling.rfilename in files))
    fetch(files)
    listing = _checked(temporary, info, files)
    for path in temporary.iterdir():  # the library's metadata, and files of an earlier attempt at another revision
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    facts = {"made_by": "download", "name": name, "revision": revision, "commit": info.sha, "files": listing}
    publish(temporary, folder, facts)


def _refuse_what_cannot_be_trained(name: str, folder: Path) -> None:
    """Check the downloaded config before gigabytes of weights are downloaded.

    Raises:
        ValueError: this kit cannot train such a model; the folder has been removed.
    """
    try:
        read_config(folder)
    except ValueError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{name!r} was not downloaded from the Hub: {error}") from None


@contextmanager
def _download_errors(name: str, revision: str) -> Iterator[None]:
    """Turn the library's many error types, except a full disk, into one FileNotFoundError."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise FileNotFoundError(
            f"{name!r} is not a folder in {Path.cwd()}, and its revision {revision!r} could not be downloaded from the "
            f"Hub ({error}); check the name and the network, and set HF_TOKEN for a gated model"
        ) from error


def _needed(info: ModelInfo) -> list[str]:
    names = [sibling.rfilename for sibling in info.siblings]
    if CONFIG not in names:
        raise ValueError(f"{info.id!r} on the Hub has no {CONFIG}: it is not a transformers model")
    for kind in WEIGHTS:
        weights = [name for name in names if kind.fullmatch(name)]
        if weights:
            return weights + [name for name in names if DESCRIBING.fullmatch(name)]
    raise ValueError(f"{info.id!r} on the Hub has neither model.safetensors nor pytorch_model.bin, single or sharded")


def _checked(folder: Path, info: ModelInfo, files: list[str]) -> dict[str, dict]:
    """The files' entries for a manifest, with SHA-256 compared to the Hub's where it has one."""
    listing = {}
    for sibling in info.siblings:
        if sibling.rfilename not in files:
            continue
        path = folder / sibling.rfilename
        sha256 = file_hash(path)
        if sibling.lfs and sha256 != sibling.lfs.sha256:
            path.unlink()
            raise ValueError(f"{path} was damaged in the download: its SHA-256 differs from the Hub's; try again")
        listing[sibling.rfilename] = {"bytes": path.stat().st_size, "sha256": sha256}
    return listing
