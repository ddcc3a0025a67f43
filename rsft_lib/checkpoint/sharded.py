"""Sharded state dicts of a built model and its optimizer: names in checkpoints, and loading."""

import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.lazy_weights import Box, Piece, Weights, overlaps, refuse, resized
from rsft_lib.common.artifact import WRITERS, verification
from rsft_lib.model.config import read_config

# One tensor per layer and weight, and optimizer states with the shapes of the weights: loadable at any parallel size.
SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


@dataclass
class Shard(ShardedTensor):
    """A part of a tensor that is not in memory as it is stored, such as an optimizer state; its `data` is None."""

    get: Callable[[], torch.Tensor] = field(default=lambda: torch.empty(0), repr=False)
    """Computes the value to save."""
    put: Callable[[torch.Tensor], None] = field(default=lambda value: None, repr=False)
    """Takes the loaded value."""


def sharded_weights(model: torch.nn.Module) -> dict:
    """This rank's weights as sharded tensors.

    Transformer Engine's extra states only hold FP8 scales; without them, both backends write the same checkpoints.
    """
    entries = model.sharded_state_dict(metadata=dict(SHARDING))  # megatron-core adds process groups
    return {
        name: entry
        for name, entry in entries.items()
        if not (isinstance(entry, ShardedObject) and _is_extra_state(name))
    }


def _is_extra_state(name: str) -> bool:
    """Whether it is a state of Transformer Engine; grouped experts number theirs: `_extra_state`, `_extra_state1`."""
    return re.fullmatch(r"_extra_state\d*", name.rpartition(".")[2]) is not None


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Load this rank's part of a model from a Hugging Face folder or a checkpoint of any layout.

    A rank only reads its own shard, from memory-mapped files; dtypes are converted. Padding rows of the vocabulary
    become 0. Rank 0 checks the files before any rank reads them; an error there ends the job.

    Raises:
        FileNotFoundError: weights or a file are missing, or the checkpoint was not finished.
        ValueError: a file is damaged or unsafe, or the weights do not match this model.
    """
    if torch.distributed.get_rank() == 0:
        any_format.check(folder)
    torch.distributed.barrier()
    config = read_config(folder)
    weights = any_format.whole_vocabulary(any_format.open_weights(folder, config), config)
    places = _places(sharded_weights(model))
    weights = _matched(weights, places, folder)
    for place in places:
        place.data.copy_(_read(weights, place))


@torch.no_grad()
def load(state_dict: dict, folder: Path) -> None:
    """Fill the sharded tensors of this rank's state dict, at any parallel size, from a `torch_dist` checkpoint.

    Replaces megatron-core's `dist_checkpointing.load`, which executes pickles in the checkpoint. Tensors are
    memory-mapped, so a rank only reads its own shards; padding rows are 0. Threads hash the files that this rank reads,
    others read them; nothing of a file is read before its hash is verified.

    Raises:
        DamagedError: a file differs from its manifest. Some tensors of other files are filled.
        ValueError: a file is unsafe, or the tensors do not match this run.
    """
    places, stored = _places(state_dict), torch_dist.stored_parts(folder)
    layout = Weights({name: [part.piece for part in parts] for name, parts in stored.items()})
    _matched(layout, places, folder)
    needed = (part for place in places for part in stored[place.key] if overlaps(part.piece, _box(place)))
    files, names = torch_dist.MappedFiles(folder), dict.fromkeys(part.info.relative_path for part in needed)
    with verification(folder, names) as verified:

        def opened(part: torch_dist.StoredPart, box: Box) -> Piece:
            if not overlaps(part.piece, box):
                return part.piece
            verified(part.info.relative_path)
            return files.open(part)

        @torch.no_grad()
        def fill(place: ShardedTensor) -> None:
            weights = Weights({place.key: [opened(part, _box(place)) for part in stored[place.key]]})
            if place.allow_shape_mismatch:
                weights = resized(weights, [place.key], place.global_shape[0])
            # A copy, since one thread would read the file while the others wait to copy to the GPU.
            _fill(place, _read(weights, place).clone())

        with ThreadPoolExecutor(WRITERS) as threads:
            try:
                for of_optimizer in (False, True):  # master weights also set the weights, so they come second
                    some = [place for place in places if isinstance(place, Shard) == of_optimizer]
                    deque(threads.map(fill, some), maxlen=0)
            finally:
                threads.shutdown(cancel_futures=True)


def value_of(place: ShardedTensor) -> torch.Tensor:
    """The value to save of a sharded tensor, with an axis of 1 for each that its global shape has besides."""
    value = place.get() if isinstance(place, Shard) else place.data.detach()
    return value.view((1,) * place.prepend_axis_num + tuple(place.local_shape))


def _fill(place: ShardedTensor, value: torch.Tensor) -> None:
    if isinstance(place, Shard):
        place.put(value)
    else:
        place.data.copy_(value)


def _read(weights: Weights, place: ShardedTensor) -> torch.Tensor:
    """A rank's shard in its own shape, which lacks the first axis of a weight of stacked experts."""
    return weights.read(place.key, _box(place)).reshape(place.local_shape)


def _box(place: ShardedTensor) -> Box:
    return tuple(slice(at, at + 1) if isinstance(at, int) else at for at in place.global_slice())


def _matched(weights: Weights, places: list[ShardedTensor], folder: Path) -> Weights:
    """The weights with the vocabulary padding that `places` expect.

    Raises:
        ValueError: there is any other mismatch.
    """
    rows = {place.key: place.global_shape[0] for place in places if place.allow_shape_mismatch}
    for name, padded in rows.items():
        if name in weights.pieces:
            weights = resized(weights, [name], padded)
    mismatches = [text for place in places if (text := _mismatch(place, weights))]
    refuse(mismatches, f"weights of {folder} do not match the model")
    return weights


def _mismatch(place: ShardedTensor, weights: Weights) -> str:
    if place.key not in weights.pieces:
        return f"{place.key}: missing"
    shape = tuple(weights.empty(place.key).shape)
    return "" if shape == place.global_shape else f"{place.key}: shape {shape}, the model has {place.global_shape}"


def _places(entry) -> list[ShardedTensor]:
    """The sharded tensors in a state dict; the weight of fc1 consists of two."""
    if isinstance(entry, ShardedTensorFactory):
        return _places(entry.build())
    if isinstance(entry, dict | list):
        return [place for part in (entry.values() if isinstance(entry, dict) else entry) for place in _places(part)]
    return [entry] if isinstance(entry, ShardedTensor) else []
