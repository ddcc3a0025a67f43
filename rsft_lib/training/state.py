"""What a rank holds of a run (model, optimizer, schedule, step), and how a checkpoint stores it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rsft_lib.checkpoint import sharded
from rsft_lib.checkpoint.sharded import SHARDING, load_weights, set_weights, sharded_weights
from rsft_lib.data.span_kinds import Control
from rsft_lib.model.gpt import ResponseModel

# Gather optimizer states through the CPU; through the GPU, it would need their size again in GPU memory.
LAYOUT = {**SHARDING, "distrib_optim_fully_reshardable_mem_efficient": True}


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
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)  # with overlap, the updated weights may not have been gathered yet
    weights = {f"model{number}": sharded_weights(chunk.module) for number, chunk in enumerate(state.chunks)}
    return {
        **(weights if len(weights) > 1 else {"model": weights["model0"]}),
        "optimizer": state.optimizer.sharded_state_dict(
            weights if len(weights) > 1 else weights["model0"], is_loading=loading, metadata=LAYOUT
        ),
        "iteration": state.iteration,
        "rng": torch.get_rng_state(),
    }


def start(state: TrainState, checkpoint: Path) -> None:
    """Start a run with the weights of a checkpoint."""
    for chunk in state.chunks:
        load_weights(chunk.module, checkpoint)


def load(state: TrainState, checkpoint: Path) -> None:
    """Resume from a checkpoint of a run, saved at any parallel sizes."""
    loaded = sharded.load(content(state, loading=True), checkpoint)
    for number, chunk in enumerate(state.chunks):
        set_weights(chunk.module, loaded["model" if len(state.chunks) == 1 else f"model{number}"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    state.iteration = loaded["iteration"]
    state.scheduler.step(increment=state.iteration)
