"""Sharded tensors of a built model and its optimizer: their names in checkpoints, and how they are loaded."""

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.lazy_weights import Weights, refuse, resized
from rsft_lib.model.config import read_config

# One tensor per layer and weight, and optimizer states shaped like weights: loadable in any layout.
SHARDING = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}


def sharded_weights(model: torch.nn.Module) -> dict:
    """This rank's weights, each with its place in the whole.

    Transformer Engine's extra states hold FP8 scales only; without them, checkpoints of both backends are alike.
    """
    entries = model.sharded_state_dict(metadata=SHARDING)
    return {
        name: entry
        for name, entry in entries.items()
        if not (isinstance(entry, ShardedObject) and name.endswith("_extra_state"))
    }


def set_weights(model: torch.nn.Module, loaded: dict) -> None:
    """Put what was loaded for `sharded_weights(model)` into the model."""
    while not isinstance(model, GPTModel):  # the wrapper for bf16 tells nothing of what it loads
        model = model.module
    result = model.load_state_dict(loaded, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


@torch.no_grad()
def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Fill this rank's part of a built model from a folder: a Hugging Face one, or a checkpoint of any layout.

    A rank reads nothing but its own part, from memory-mapped files; dtypes are converted. Rows by which the model's
    vocabulary is padded become 0. Rank 0 checks the files before any rank uses them; an error there ends the job.

    Raises:
        FileNotFoundError: there are no weights, the checkpoint was not finished, or lacks a file.
        ValueError: a file is damaged or not to be trusted, or the weights are not those of this model.
    """
    if torch.distributed.get_rank() == 0:
        any_format.check(folder)
    torch.distributed.barrier()
    config = read_config(folder)
    weights = any_format.whole_vocabulary(any_format.open_weights(folder, config), config)
    places = _places(sharded_weights(model))
    weights = _matched(weights, places, folder)
    for place in places:
        place.data.copy_(weights.read(place.key, place.global_slice()))


def load(wanted: dict, folder: Path) -> dict:
    """Load a sharded state dict of this rank, at any layout, from a `torch_dist` checkpoint.

    Replaces megatron-core's `dist_checkpointing.load`, which executes pickles in the checkpoint. Tensors are
    memory-mapped, so a rank reads only what it copies from them; padding rows are 0.

    Hashes are not verified again: pass a checkpoint that `artifact.newest` or `artifact.verify` accepted.

    Raises:
        ValueError: a file is not to be trusted, or the tensors are not those of this run.
    """
    places = _places(wanted)
    weights = torch_dist.open_weights(folder, {place.key for place in places}.__contains__)
    return _loaded(wanted, torch_dist.read_common(folder), _matched(weights, places, folder))


def _loaded(wanted, common, weights: Weights):
    """`wanted` with its sharded tensors read, and every other leaf taken from the same place in `common`."""
    if isinstance(wanted, ShardedTensorFactory):
        return wanted.merge_fn(_loaded(wanted.build(), None, weights))
    if isinstance(wanted, ShardedTensor):
        return weights.read(wanted.key, wanted.global_slice())
    if isinstance(wanted, dict):
        found = common if isinstance(common, dict) else {}
        return {key: _loaded(value, found.get(key), weights) for key, value in wanted.items()}
    if isinstance(wanted, list) and _places(wanted):
        return [_loaded(value, None, weights) for value in wanted]
    return common


def _matched(weights: Weights, places: list[ShardedTensor], folder: Path) -> Weights:
    """The weights with the vocabulary padding that `places` expect; any other mismatch is refused."""
    rows = {place.key: place.global_shape[0] for place in places if place.allow_shape_mismatch}
    for name, padded in rows.items():
        if name in weights.pieces:
            weights = resized(weights, [name], padded)
    refuse([text for place in places if (text := _misfit(place, weights))], f"weights of {folder} are not the model's")
    return weights


def _misfit(place: ShardedTensor, weights: Weights) -> str:
    if place.key not in weights.pieces:
        return f"{place.key}: missing"
    found = tuple(weights.empty(place.key).shape)
    return "" if found == place.global_shape else f"{place.key}: shape {found}, the model has {place.global_shape}"


def _places(entry) -> list[ShardedTensor]:
    """Where in the whole each part of a state stands; the halves of fc1 stand in two places."""
    if isinstance(entry, ShardedTensorFactory):
        return _places(entry.build())
    if isinstance(entry, dict | list):
        return [place for part in (entry.values() if isinstance(entry, dict) else entry) for place in _places(part)]
    return [entry] if isinstance(entry, ShardedTensor) else []
