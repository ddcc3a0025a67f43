"""What a rank holds of a run (model, optimizer, schedule, step), and how a checkpoint stores it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rsft_lib.checkpoint import sharded
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.sharded import SHARDING, load_weights, sharded_weights
from rsft_lib.common.artifact import DamagedError
from rsft_lib.data.span_kinds import Control
from rsft_lib.model.gpt import ResponseModel


@dataclass
class TrainState:
    """This rank's part of the model, its optimizer and schedule, and the number of completed steps."""

    chunks: list[DistributedDataParallel]
    """One, or several groups of layers with virtual pipeline stages."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0

    def watch(self, control: Control | None) -> None:
        """Have the model return the log probabilities of the modes' control tokens at every target."""
        for chunk in self.chunks:
            model = chunk
            while not isinstance(model, ResponseModel):
                model = model.module
            model.watched = control.modes if control else ()


def content(state: TrainState, *, loading: bool = False) -> dict:
    """The contents of a checkpoint as a sharded state dict.

    Training draws no random numbers; the generator's state is included for extensions that do.
    """
    weights = weights_of(state)
    return {
        **weights,
        "optimizer": state.optimizer.sharded_state_dict(
            weights if len(weights) > 1 else weights["model"], is_loading=loading, metadata=SHARDING
        ),
        "iteration": state.iteration,
        "rng": torch.get_rng_state(),
    }


def weights_of(state: TrainState) -> dict[str, dict]:
    """The current weights as sharded state dicts: `model`, or one for each of several groups of layers."""
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)  # with overlap, the updated weights may not have been gathered yet
    if len(state.chunks) == 1:
        return {"model": sharded_weights(state.chunks[0].module)}
    return {f"model{number}": sharded_weights(chunk.module) for number, chunk in enumerate(state.chunks)}


def start(state: TrainState, checkpoint: Path) -> None:
    """Start a run with the weights of a checkpoint."""
    for one in state.optimizer.chained_optimizers:
        one.optimizer.reset()  # part of a damaged checkpoint may have been loaded
    for chunk in state.chunks:
        load_weights(chunk.module, checkpoint)


def load(state: TrainState, checkpoint: Path) -> None:
    """Resume from a checkpoint of a run, saved at any parallel sizes; its hashes are verified while it is read.

    Raises:
        DamagedError: on every rank, if a file differs from its manifest for any of them. The state is then undefined:
            load another checkpoint, or `start`.
        ValueError: a file is unsafe, or the tensors do not match this run.
    """
    common, damage = torch_dist.read_common(checkpoint), ""
    try:
        sharded.load(content(state, loading=True), checkpoint)
    except DamagedError as error:
        damage = str(error)
    found = [damage] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, damage)
    if any(found):
        raise DamagedError(next(filter(None, found)))
    state.optimizer.load_state_dict(common["optimizer"])
    torch.set_rng_state(common["rng"])
    state.iteration = common["iteration"]
    state.scheduler.step(increment=state.iteration)
