"""A megatron-core `torch_dist` checkpoint, written and read one tensor at a time, with no model and no ranks.

The format is torch's distributed checkpoint (`.metadata` and `*.distcp`) with megatron-core's `metadata.json`
and `common.pt` beside it: megatron/core/dist_checkpointing/strategies.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


class _LazyPlanner(DefaultSavePlanner):
    """Plans from empty tensors and fetches each real one when its turn to be written comes."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self.read = read

    def lookup_object(self, index):
        return self.read(index.fqn)


def write(folder: Path, empty: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write a checkpoint into `folder`.

    Args:
        empty: name -> tensor on the meta device, which gives shape and dtype.
        read: gives the tensor of a name; called once for each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of the missing process group
        dcp.save(empty, storage_writer=dcp.FileSystemWriter(folder), planner=_LazyPlanner(read), no_dist=True)
    torch.save({}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by name, on the meta device: shape and dtype without data."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }


def read(folder: Path, empty: Tensor, name: str) -> Tensor:
    """The tensor `name`, whole, whatever layout it was saved in; `empty` is its entry of `tensors`."""
    loaded = {name: torch.empty_like(empty, device="cpu")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return loaded[name]
