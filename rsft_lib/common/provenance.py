"""What a run was made with: versions, machine, code. No settings of the environment, since those hold secrets."""

import platform
import shutil
import subprocess
from importlib import metadata

import psutil

from rsft_lib.common.paths import ROOT

PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "datasets", "rsft-lib")


def made_with() -> dict[str, str]:
    """Name -> version or description, of everything that a result may depend on beside its parameters and inputs."""
    import torch  # some notebooks do without it

    memory = psutil.virtual_memory().total / 2**30
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "CUDA": str(torch.version.cuda),
        "GPUs": _gpus(),
        "host": f"{platform.node()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, {platform.platform()}",
        "git commit": _commit(),
    }


def listed(facts: dict[str, str]) -> str:
    """One fact on each line."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none"
    found = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    kinds = [line.replace(", ", ", driver ") for line in found]
    return "; ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "none"


def _commit() -> str:
    """The commit of the project's code, and how many of its files differ from it."""
    commit = _said("git", "-C", str(ROOT), "rev-parse", "HEAD").strip()
    changed = len(_said("git", "-C", str(ROOT), "status", "--porcelain").splitlines())
    if not commit:
        return "not known"
    return f"{commit}, dirty: {changed} changed files" if changed else f"{commit}, clean"


def _said(*command: str) -> str:
    """What a command printed; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
