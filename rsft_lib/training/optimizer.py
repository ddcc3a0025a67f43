"""AdamW and its schedule, from megatron-core's distributed optimizer, on torch's AdamW as well as on TE's."""

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from rsft_lib.training.config import TrainConfig


def build_optimizer(config: TrainConfig, model) -> MegatronOptimizer:
    """The distributed optimizer: fp32 master weights and moments, each held by one data-parallel rank."""
    bf16 = config.precision == "bf16"
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            clip_grad=config.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
        ),
        [model],
    )


def build_schedule(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up to `lr`, then a cosine down to `min_lr`, counted in optimizer steps."""
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=int(config.warmup_fraction * config.train_iters),
        lr_decay_steps=config.train_iters,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters,
        wd_incr_style="constant",
    )
    schedule.step(increment=1)  # no step is taken at a learning rate of 0
    return schedule


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: dict) -> None:
    """`optimizer.load_state_dict`, which megatron-core 0.16.1 gets wrong for torch's AdamW in two ways.

    It expects a step in every parameter's loaded state but leaves it out, and it makes all parameters share
    one step tensor, which each of them then counts up.
    """
    for one in _on_torch_adam(optimizer):
        one._set_main_param_and_optimizer_states = _with_step(one)
    optimizer.load_state_dict(loaded)
    for one in _on_torch_adam(optimizer):
        del one._set_main_param_and_optimizer_states
        for entry in one.optimizer.state.values():
            entry["step"] = entry["step"].clone()


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the state it has after its first step: megatron-core loads only into what is there."""
    for one in _on_torch_adam(optimizer):
        for parameter in (p for group in one.optimizer.param_groups for p in group["params"]):
            one.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _on_torch_adam(optimizer: MegatronOptimizer) -> list:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in parts if isinstance(one.optimizer, torch.optim.AdamW)]


def _with_step(one):
    original, adam = one._set_main_param_and_optimizer_states, one.optimizer

    def set_states(model_param, tensors):
        group, order = one.model_param_group_index_map[model_param]
        main_param = adam.param_groups[group]["params"][order]
        original(model_param, {"step": adam.state[main_param]["step"], **tensors})

    return set_states
