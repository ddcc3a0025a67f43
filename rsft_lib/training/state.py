"""What a run consists of at one moment, and its checkpoints: `iter_0000000` folders that are whole or absent."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rsft_lib.artifact import publish, read_manifest
from rsft_lib.checkpoint.sharded import SHARDING, set_weights, sharded_weights
from rsft_lib.training.config import SHAPES_THE_RUN
from rsft_lib.training.optimizer import allocate_moments, load_optimizer_state


@dataclass
class TrainState:
    """This rank's part of the model, its optimizer and schedule, and how many steps are done."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    iteration: int = 0


def load(state: TrainState, checkpoint: Path) -> None:
    """Continue from a checkpoint of a run, saved at any parallel layout."""
    model = sharded_weights(state.model.module)
    allocate_moments(state.optimizer)
    wanted = {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, is_loading=True, metadata=SHARDING),
    }
    loaded = dist_checkpointing.load(wanted, str(checkpoint))
    set_weights(state.model.module, loaded["model"])
    load_optimizer_state(state.optimizer, loaded["optimizer"])
    state.iteration = loaded["iteration"]
    state.scheduler.step(increment=state.iteration)


def save(state: TrainState, output: Path, model_config: Path, facts: dict) -> Path:
    """Write `iter_NNNNNNN` under `output`, all ranks together; it appears under that name only when whole."""
    final = output / f"iter_{state.iteration:07d}"
    temporary = final.with_name(f".{final.name}.tmp")
    if _rank_0():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    model = sharded_weights(state.model.module)
    content = {
        "model": model,
        "optimizer": state.optimizer.sharded_state_dict(model, metadata=SHARDING),
        "iteration": state.iteration,
    }
    dist_checkpointing.save(content, str(temporary), content_metadata=SHARDING)
    torch.distributed.barrier()
    if _rank_0():
        shutil.copyfile(model_config, temporary / "config.json")
        publish(temporary, final, {"made_by": "train", "iteration": state.iteration, **facts})
    torch.distributed.barrier()
    return final


def refuse_another_run(checkpoint: Path, facts: dict) -> None:
    """A run may be continued only with the settings and the data it began with.

    Raises:
        ValueError: with every difference.
    """
    before, now = read_manifest(checkpoint), facts
    differences = [
        f"{name}: was {before['config'][name]!r}, now {now['config'][name]!r}"
        for name in SHAPES_THE_RUN
        if before["config"][name] != now["config"][name]
    ]
    if before["data_sha256"] != now["data_sha256"]:
        differences.append("data: the tokenized data has changed")
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} belongs to another run:\n  {listed}\n"
            "Set these back to continue it, or choose another output folder for a new run."
        )


def _rank_0() -> bool:
    return torch.distributed.get_rank() == 0
