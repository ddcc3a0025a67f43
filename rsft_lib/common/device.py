"""The device of this process, and the GPU of this machine."""

import functools
import shutil
import subprocess

import torch


def device() -> torch.device:
    """The device for this process's tensors."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.cache
def gpu() -> tuple[str, int] | None:
    """Name and memory in bytes of this machine's first GPU, read without allocating on it; None without a GPU."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    name, mebibytes = (
        subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(",")
    )
    return name.strip(), int(mebibytes) * 2**20
