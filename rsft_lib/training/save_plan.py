"""Which rank writes which tensors of a checkpoint, and into which files."""

import math
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

from rsft_lib.checkpoint.any_format import OF_A_MODEL
from rsft_lib.checkpoint.formats.torch_dist import FILE_SIZE
from rsft_lib.checkpoint.sharded import Shard


class Part(NamedTuple):
    """A part of a tensor, as ranks describe it to each other."""

    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    """The shape of the tensor."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SavePlan(NamedTuple):
    """A rank's share of a checkpoint."""

    files: list[list[ShardedTensor]]
    """What it writes into each of its files: weights, which export reads, apart from optimizer states."""
    layout: dict[str, TensorStorageMetadata]
    """All tensors of the checkpoint with their parts."""

    @property
    def nbytes(self) -> int:
        return sum(_part(place).nbytes for places in self.files for place in places)


def plan_save(places: list[ShardedTensor]) -> SavePlan:
    """Divide the parts of all tensors evenly among the ranks that have them; collective.

    Args:
        places: the parts that this rank has. Replicas of a weight are equal; of an optimizer state, only the main
            replica is written, since the boxes of others may differ.
    """
    places = [place for place in places if not isinstance(place, Shard) or is_main_replica(place.replica_id)]
    own, rank = {_part(place): place for place in places}, torch.distributed.get_rank()
    everyone: list[list[Part]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, list(own))
    owners: dict[Part, list[int]] = {}
    for number, parts in enumerate(everyone):
        for part in parts:
            owners.setdefault(part, []).append(number)
    written, mine = [0] * len(everyone), set()
    for part in sorted(owners, key=lambda part: part.nbytes, reverse=True):
        writer = min(owners[part], key=written.__getitem__)
        written[writer] += part.nbytes
        if writer == rank:
            mine.add(part)
    return SavePlan(_files({part: place for part, place in own.items() if part in mine}), _layout(owners))


def _part(place: ShardedTensor) -> Part:
    shape = (1,) * place.prepend_axis_num + tuple(place.local_shape)
    return Part(place.key, tuple(place.global_offset), shape, tuple(place.global_shape), place.dtype)


def _files(mine: dict[Part, ShardedTensor]) -> list[list[ShardedTensor]]:
    files: list[list[ShardedTensor]] = []
    for of_model in (True, False):
        size = math.inf
        for part, place in mine.items():
            if part.name.startswith(OF_A_MODEL) != of_model:
                continue
            if size > FILE_SIZE:
                files.append([])
                size = 0
            files[-1].append(place)
            size += part.nbytes
    return files


def _layout(parts: dict[Part, list[int]]) -> dict[str, TensorStorageMetadata]:
    layout: dict[str, TensorStorageMetadata] = {}
    for part in parts:
        empty = TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(part.whole), [])
        chunk = ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
        layout.setdefault(part.name, empty).chunks.append(chunk)
    for name, entry in layout.items():
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        assert stored == math.prod(entry.size), f"the parts of {name} hold {stored} of {math.prod(entry.size)} elements"
    return layout
