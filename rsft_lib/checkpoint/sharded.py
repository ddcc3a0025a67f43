"""Sharded state dicts of a built model and its optimizer: names in checkpoints, and loading."""

import re
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.lazy_weights import Weights, refuse, resized
from rsft_lib.model.config import read_config

# One tensor per layer and weight, and optimizer states with the shapes of the weights: loadable at any parallel size.
SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


def sharded_weights(model: torch.nn.Module) -> dict:
    """This rank's weights as sharded tensors.

    Transformer Engine's extra states only hold FP8 scales; without them, both backends write the same checkpoints.
    """
    entries = model.sharded_state_dict(metadata=SHARDING)
    return {
        name: entry
        for name, entry in entries.items()
        if not (isinstance(entry, ShardedObject) and _is_extra_state(name))
    }


def _is_extra_state(name: str) -> bool:
    """Whether it is a state of Transformer Engine; grouped experts number theirs: `_extra_state`, `_extra_state1`."""
    return re.fullmatch(r"_extra_state\d*", name.rpartition(".")[2]) is not None


def set_weights(model: torch.nn.Module, loaded: dict) -> None:
    """Load the values of `sharded_weights(model)` into the model."""
    while not isinstance(model, GPTModel):  # the bf16 wrapper's load_state_dict does not report missing keys
        model = model.module
    result = model.load_state_dict(loaded, strict=False)
    missing = [name for name in result.missing_keys if not _is_extra_state(name)]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


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


def load(state_dict: dict, folder: Path) -> dict:
    """Load a sharded state dict of this rank, at any parallel size, from a `torch_dist` checkpoint.

    Replaces megatron-core's `dist_checkpointing.load`, which executes pickles in the checkpoint. Tensors are
    memory-mapped, so a rank only reads its own shards; padding rows are 0.

    Hashes are not verified: pass a checkpoint that `run_checkpoints.newest` or `artifact.verify` accepted.

    Raises:
        ValueError: a file is unsafe, or the tensors do not match this run.
    """
    places = _places(state_dict)
    weights = torch_dist.open_weights(folder, {place.key for place in places}.__contains__)
    return _loaded(state_dict, torch_dist.read_common(folder), _matched(weights, places, folder))


def _loaded(entry, common, weights: Weights):
    """`entry` with its sharded tensors read, and every other leaf replaced by its counterpart in `common`."""
    if isinstance(entry, ShardedTensorFactory):
        return entry.merge_fn(_loaded(entry.build(), None, weights))
    if isinstance(entry, ShardedTensor):
        return _read(weights, entry)
    if isinstance(entry, dict):
        values = common if isinstance(common, dict) else {}
        return {key: _loaded(value, values.get(key), weights) for key, value in entry.items()}
    if isinstance(entry, list) and _places(entry):
        return [_loaded(value, None, weights) for value in entry]
    return common


def _read(weights: Weights, place: ShardedTensor) -> torch.Tensor:
    """A rank's shard in its own shape, which lacks the first axis of a weight of stacked experts."""
    box = tuple(slice(at, at + 1) if isinstance(at, int) else at for at in place.global_slice())
    return weights.read(place.key, box).reshape(place.local_shape)


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
