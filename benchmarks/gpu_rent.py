"""Hand-written parts compared with the best library alternative; sections of train_gpu.py."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.data.packed import PackedDataset
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loop import update
from rsft_lib.training.optimizer import DTYPES
from rsft_lib.training.saving import Saver
from rsft_lib.training.state import TrainState, load


def with_parts(measure: Callable[[], dict], parts: dict) -> dict:
    """`measure()` with functions of the kit replaced; `parts` is full name of a function -> its replacement."""
    with ExitStack() as stack:
        for name, other in parts.items():
            stack.enter_context(mock.patch(name, other))
        return measure()


# Transformer Engine's FusedAdam, which stores the 16 low bits of float32 master weights, in megatron-core's optimizer.


def fused_adam(config: TrainConfig, chunks: list) -> MegatronOptimizer:
    settings = OptimizerConfig(
        optimizer="adam", lr=config.lr, min_lr=config.min_lr, weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1, adam_beta2=config.adam_beta2, clip_grad=config.clip_grad, bf16=True,
        params_dtype=torch.bfloat16, use_distributed_optimizer=True, use_precision_aware_optimizer=True,
        store_param_remainders=True, main_grads_dtype=DTYPES[config.gradients],
        exp_avg_dtype=DTYPES[config.moments], exp_avg_sq_dtype=DTYPES[config.moments],
    )  # fmt: skip
    return get_megatron_optimizer(settings, chunks)


def fused_adam_step(optimizer: MegatronOptimizer, norm: float, denominator: float, clip_grad: float) -> None:
    shrink = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
    for one in optimizer.chained_optimizers:
        grads = [getattr(weight, "decoupled_grad", None) for weight in one.get_parameters()]
        torch._foreach_mul_([grad for grad in grads if grad is not None], shrink / denominator)
    optimizer.step_with_ready_grads()


FUSED_ADAM = {
    "rsft_lib.training.build.build_optimizer": fused_adam,
    "rsft_lib.training.optimizer.step": fused_adam_step,
}


def resumed(config: TrainConfig, begin: Callable[[TrainState], None], data: PackedDataset) -> dict:
    """Run six steps, and the last three again from a checkpoint.

    Returns:
        The losses, and the maximum differences of losses and weights; 0 for a run that resumes bit for bit.
    """
    packs, loader, folder = data.step(0, config.global_batch_size), Loader(data, config), config.checkpoint

    def steps(state: TrainState) -> list[float]:
        losses = []
        for _ in range(3):
            losses.append(update(state, loader, packs, packs).counts[0])
            state.scheduler.step(increment=1)
            state.iteration += 1
        return losses

    straight, again = (build_state(config, Path(folder)) for _ in range(2))
    begin(straight)
    losses = steps(straight)
    with tempfile.TemporaryDirectory() as place:
        hf, limits = Path(folder) / "config.json", {"size": 0, "timeout": 600, "keep_last": 0, "keep_every": 0}
        Saver(Path(place), hf, {}, iteration=0, **limits).save(straight, wait=True)
        load(again, newest(Path(place)))
    losses, repeated = losses + steps(straight), steps(again)
    pairs = zip(straight.chunks[0].parameters(), again.chunks[0].parameters(), strict=True)
    return {
        "losses": losses,
        "repeated": repeated,
        "losses_apart": max(abs(a - b) for a, b in zip(losses[3:], repeated, strict=True)),
        "weights_apart": max((a.float() - b.float()).abs().max().item() for a, b in pairs),
    }
