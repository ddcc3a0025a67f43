"""The environment of a run: versions, machine, commit. No environment variables, since they can hold secrets."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "datasets", "rsft-lib")


def made_with() -> dict[str, str]:
    """Name -> version or description of everything a result may depend on besides its parameters and inputs."""
    import torch  # slow, and some notebooks do not need it

    memory = psutil.virtual_memory().total / 2**30
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA": str(torch.version.cuda),
        "GPUs": _gpus(),
        "host": f"{platform.node()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.platform()}",
        "git commit": _commit(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none"
    lines = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    kinds = [line.replace(", ", ", driver ") for line in lines]
    return "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"


def _commit() -> str:
    """The commit of the project and the number of files that differ from it."""
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD").strip()
    changed = len(_output("git", "-C", str(Path(__file__).parent), "status", "--porcelain").splitlines())
    if not commit:
        return "unknown"
    return f"{commit}, dirty: {changed} changed files" if changed else f"{commit}, clean"


def _output(*command: str) -> str:
    """The stdout of a command; empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
