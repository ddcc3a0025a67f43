"""Assemble this rank's model (`model.gpt`), optimizer and schedule (`training.optimizer`) from the settings."""

from pathlib import Path

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import HAVE_FUSED_QKV_ROPE
from megatron.core.transformer.module import Float16Module
from transformers import PretrainedConfig

from rsft_lib.common.device import device
from rsft_lib.model import engine
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import allocate_overlap_buffers
from rsft_lib.model.gpt import build_model, resolve_backend
from rsft_lib.model.router import routers
from rsft_lib.model.transformer_config import transformer_config
from rsft_lib.model.weight_map import expert_count
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.optimizer import build_optimizer, build_schedule
from rsft_lib.training.preflight import check_model
from rsft_lib.training.state import TrainState


def build_state(config: TrainConfig, checkpoint: Path) -> TrainState:
    """This rank's model chunks with gradient buffers, its shard of the optimizer, and the schedule.

    Trained weights are 0 until `load` or `start` fills them.
    """
    hf = read_config(checkpoint)
    check_model(config, hf)
    mcore = model_settings(config, hf)
    if (config.recompute == "selective" or config.recompute_layers) and "layernorm" in mcore.recompute_modules:
        engine.prepare_recomputation()
    if config.tensor_overlap:
        tokens = config.seq_length * config.micro_batch_size // config.context_parallel
        allocate_overlap_buffers(tokens, hf.hidden_size, config.tensor_parallel, config.precision == "fp8")
    stages = range(config.virtual_pipeline) if config.virtual_pipeline > 1 else [None]
    chunks = [_wrapped(config, mcore, hf, stage) for stage in stages]
    # The optimizer step divides by the sum of loss weights, so megatron-core must not divide by the number of tokens.
    mcore.finalize_model_grads_func = lambda model, num_tokens, **rest: finalize_model_grads(model, None, **rest)
    mcore.grad_scale_func = None
    if chunks[0].ddp_config.overlap_grad_reduce:
        mcore.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    optimizer = build_optimizer(config, chunks)
    return TrainState(chunks, optimizer, build_schedule(config, optimizer))


def model_settings(config: TrainConfig, hf: PretrainedConfig) -> TransformerConfig:
    """The architecture of `hf` with the settings of a run."""
    low = config.precision != "fp32"
    dtype = torch.bfloat16 if low else torch.float32
    backend = resolve_backend(config.backend, config.precision)
    if config.precision == "fp8" and backend != "te":
        raise ValueError("precision 'fp8' needs a CUDA GPU and transformer-engine; choose 'bf16'")
    if config.tensor_overlap and backend != "te":
        raise ValueError("tensor_overlap needs CUDA GPUs and transformer-engine; set it to false")
    settings = transformer_config(
        hf,
        backend,
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        **_interleaving(config),
        context_parallel_size=config.context_parallel,
        expert_model_parallel_size=config.expert_parallel,
        expert_tensor_parallel_size=config.expert_tensor_parallel,
        sequence_parallel=config.sequence_parallel,
        tp_comm_overlap=config.tensor_overlap,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=low,
        calculate_per_token_loss=True,
        moe_aux_loss_coeff=config.router_aux_loss,
        use_te_activation_func=backend == "te" and not expert_count(hf),
        apply_rope_fusion=backend == "te",
        **_recompute(config, hf),
        **_fp8(config),
    )
    if config.recompute == "selective":  # here, since megatron-core's own is for all layers
        settings.recompute_num_layers = config.recompute_layers or None
    # Fuse the QKV split with the rotary embedding if nothing happens in between.
    fusable = (
        not settings.qk_layernorm and not settings.no_rope_freq and settings.num_query_groups >= config.tensor_parallel
    )
    settings.fused_single_qkv_rope = HAVE_FUSED_QKV_ROPE and backend == "te" and fusable
    return settings


def _interleaving(config: TrainConfig) -> dict:
    if config.virtual_pipeline == 1:
        return {}
    # Without batching: batched messages of two stages that exchange in both directions at once are mixed up.
    return {
        "virtual_pipeline_model_parallel_size": config.virtual_pipeline,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def _recompute(config: TrainConfig, hf: PretrainedConfig) -> dict:
    if config.recompute == "none":
        return {}
    # Transformer Engine always saves the inputs of FP8 linear layers.
    lean = resolve_backend(config.backend, config.precision) == "te" and config.precision == "bf16"
    if expert_count(hf):
        modules = ["layernorm", "moe_act"] if lean else ["moe"]
    else:
        modules = ["layernorm" if lean else "mlp"]
    given: dict = {"recompute_granularity": config.recompute, "recompute_modules": modules}
    if config.recompute == "full":
        layers = config.recompute_layers or hf.num_hidden_layers
        given |= {"recompute_method": "block", "recompute_num_layers": layers}
    return given


def _fp8(config: TrainConfig) -> dict:
    if config.precision != "fp8":
        return {}
    return {"fp8": "hybrid", "fp8_recipe": config.fp8_recipe}


def _wrapped(config: TrainConfig, mcore: TransformerConfig, hf: PretrainedConfig, stage: int | None):
    model = build_model(hf, mcore, resolve_backend(config.backend, config.precision), config.seq_length, stage).to(
        device()
    )
    for router in routers([model]):
        router.weight.requires_grad = not config.freeze_router
    overlap = config.overlap and config.data_parallel(torch.distributed.get_world_size()) * config.context_parallel > 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=config.gradients == "fp32",
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        check_for_nan_in_grad=False,  # the gradient norm is checked before the update
    )
    model = Float16Module(mcore, model) if config.precision != "fp32" else model
    for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
        # They are copied into one buffer below; as they were, all would be in memory twice.
        weight.data = weight.data.new_zeros(()).expand(weight.shape)
    torch.cuda.empty_cache()
    return DistributedDataParallel(mcore, ddp, model, disable_bucketing=bool(stage))
