"""What a hand-written part costs and gains against the best that a library has for it; sections of train_gpu.py."""

from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from rsft_lib.training.config import TrainConfig
from rsft_lib.training.optimizer import DTYPES


def with_parts(measure: Callable[[], dict], parts: dict) -> dict:
    """`measure()` with functions of the kit replaced: a function's full name -> what takes its place."""
    with ExitStack() as stack:
        for name, other in parts.items():
            stack.enter_context(mock.patch(name, other))
        return measure()


# Transformer Engine's FusedAdam, which keeps of float32 what a bf16 weight lacks, in megatron-core's optimizer.


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


# The loss between its products: by torch's compiler, and by one operation after the other.


def _log_sum_exp(logits):
    return logits.float().logsumexp(-1)


def _cross_entropy_backward_(logits, log_sums, labels, weights):
    probability = (logits.float() - log_sums[:, None]).exp()
    hit = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    logits.copy_((probability - hit.float()) * weights[:, None])


COMPILED_HEAD = {
    "rsft_lib.model.head.log_sum_exp": torch.compile(_log_sum_exp, dynamic=True),
    "rsft_lib.model.head.cross_entropy_backward_": torch.compile(_cross_entropy_backward_, dynamic=True),
}
PLAIN_HEAD = {"rsft_lib.model.head._kernels": lambda tensor: None}
