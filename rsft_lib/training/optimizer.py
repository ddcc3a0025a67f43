"""megatron-core's distributed optimizer with our AdamW, and the learning-rate schedule."""

from functools import partial

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rsft_lib.training.adam import AdamW
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.optimizer_shards import optimizer_shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_optimizer(config: TrainConfig, chunks: list) -> MegatronOptimizer:
    """The distributed optimizer: master weights and moments, sharded over data-parallel ranks."""
    low = config.precision != "fp32"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        clip_grad=config.clip_grad,
        bf16=low,
        params_dtype=torch.bfloat16 if low else torch.float32,
        use_distributed_optimizer=True,
    )
    # megatron-core's flag for an inner optimizer that updates bf16 weights and has its own master weights. Set after
    # the validation, which would require Transformer Engine's.
    settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = low
    optimizer = get_megatron_optimizer(settings, chunks)
    for one in optimizer.chained_optimizers:
        betas = (config.adam_beta1, config.adam_beta2)
        one.optimizer = AdamW(one.optimizer.param_groups, betas, settings.adam_eps, DTYPES[config.moments])
        one.sharded_param_state_fully_reshardable = partial(optimizer_shards, one)
        one.load_parameter_state_from_fully_reshardable = lambda loaded: None  # `sharded.load` has filled the shards
    return optimizer


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global L2 norm of the summed gradients, before normalization; synchronizes with the GPU."""
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()


def step(optimizer: MegatronOptimizer, norm: float, denominator: float, clip_grad: float) -> None:
    """One update with the gradients divided by `denominator` and clipped, both fused into AdamW's pass.

    Args:
        norm: global L2 norm of the divided gradients.
        clip_grad: maximum norm for gradient clipping; 0 for none.
    """
    shrink = min(1.0, clip_grad / (norm + 1e-6)) if clip_grad else 1.0
    for one in optimizer.chained_optimizers:
        one.optimizer.scale = shrink / denominator
    optimizer.step_with_ready_grads()


def build_schedule(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up to `lr`, then `lr_schedule` down to `min_lr`, counted in optimizer steps."""
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=int(config.warmup_fraction * config.train_iters),
        lr_decay_steps=config.train_iters,
        lr_decay_style="WSD" if config.lr_schedule == "wsd" else config.lr_schedule,
        wsd_decay_steps=max(1, int(config.decay_fraction * config.train_iters)),
        lr_wsd_decay_style="linear",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
    )
    schedule.step(increment=1)  # skip the step with a learning rate of 0
    return schedule
