"""The weights of a built model as megatron-core's `dist_checkpointing` saves and loads them: every rank its part."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel

from rsft_lib.artifact import verify

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


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the weights of a converted or trained checkpoint, saved in any layout.

    Raises:
        FileNotFoundError: the checkpoint was not finished or lacks a file.
        ValueError: a file is damaged, or the weights are not those of this model.
    """
    if torch.distributed.get_rank() == 0:  # hash once, not once per rank; an error here ends the job
        verify(checkpoint)
    torch.distributed.barrier()
    loaded = dist_checkpointing.load({"model": sharded_weights(model)}, str(checkpoint))
    set_weights(model, loaded["model"])
