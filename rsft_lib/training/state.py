"""What a run consists of at one moment, and what of it a checkpoint holds."""

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

# Optimizer states are gathered through the CPU: through the GPU it would need as much memory again as they have.
LAYOUT = {**SHARDING, "distrib_optim_fully_reshardable_mem_efficient": True}


@dataclass
class TrainState:
    """This rank's part of the model, its optimizer and schedule, and how many steps are done."""

    chunks: list[DistributedDataParallel]
    """One, or several groups of layers where pipeline stages interleave."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0

    def watch(self, control: Control | None) -> None:
        """Have the model report the probability of the modes' control tokens wherever it is trained."""
        for chunk in self.chunks:
            model = chunk
            while not isinstance(model, ResponseModel):
                model = model.module
            model.watched = control.modes if control else ()


def content(state: TrainState, *, loading: bool = False) -> dict:
    """Everything that a checkpoint holds, each tensor with its place in the whole model.

    Nothing in training draws random numbers; the state of the generator is kept for who adds something that does.
    """
    for chunk in state.chunks:
        chunk.start_param_sync(force_sync=True)  # others' updates may not have come yet where gathering overlaps
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
    """Begin a run with the weights of a checkpoint."""
    for chunk in state.chunks:
        load_weights(chunk.module, checkpoint)


def load(state: TrainState, checkpoint: Path) -> None:
    """Continue from a checkpoint of a run, saved at any parallel layout."""
    loaded = sharded.load(content(state, loading=True), checkpoint)
    for number, chunk in enumerate(state.chunks):
        set_weights(chunk.module, loaded["model" if len(state.chunks) == 1 else f"model{number}"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    state.iteration = loaded["iteration"]
    state.scheduler.step(increment=state.iteration)
