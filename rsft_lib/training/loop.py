"""The training loop: megatron-core's schedules and optimizer, step by step."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from rsft_lib.artifact import MANIFEST, file_hash, newest
from rsft_lib.checkpoint.sharded import load_weights
from rsft_lib.data.packed import PackedDataset, rank_share
from rsft_lib.data.store import TokenStore
from rsft_lib.host import device
from rsft_lib.model.config import read_config, transformer_config
from rsft_lib.model.gpt import build_model, resolve_backend
from rsft_lib.paths import existing, resolve
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loss import forward_step
from rsft_lib.training.metrics import MetricsWriter
from rsft_lib.training.optimizer import build_optimizer, build_schedule
from rsft_lib.training.state import TrainState, load, refuse_another_run, save


def train(config: TrainConfig) -> TrainState:
    """Train to `train_iters`, going on from the newest checkpoint in the run folder if there is one."""
    output, checkpoint = resolve(config.output), existing(config.checkpoint, "checkpoint")
    data = PackedDataset(TokenStore(existing(config.data, "data")), config.seq_length, config.seed)
    held_out = _held_out(config)
    state = build_state(config, checkpoint)
    facts = {"config": config.to_json(), "data_sha256": file_hash(data.store.folder / MANIFEST)}
    start(state, output, checkpoint, facts)
    metrics = MetricsWriter(output, state.iteration) if torch.distributed.get_rank() == 0 else None

    while state.iteration < config.train_iters:
        began = time.perf_counter()
        packs = data.step(state.iteration, config.global_batch_size)
        loss, tokens, grad_norm = train_step(state, config, data, packs)
        state.iteration += 1
        seconds = time.perf_counter() - began
        record = {
            "iteration": state.iteration,
            "loss": loss,
            "lr": state.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "trained_tokens": tokens,
            "tokens_per_second": config.global_batch_size * config.seq_length / seconds,
            "seconds": seconds,
            "epoch": state.iteration * config.global_batch_size / len(data),
        }
        last = state.iteration == config.train_iters
        if held_out and (last or state.iteration % config.eval_interval == 0):
            record["eval_loss"] = evaluate(state, config, held_out)
        state.scheduler.step(increment=1)
        if metrics:
            metrics.write(**record)
            if last or state.iteration % config.log_interval == 0:
                print(_log_line(record, config.train_iters), flush=True)
        if last or state.iteration % config.save_interval == 0:
            save(state, output, checkpoint / "config.json", facts)
    return state


def build_state(config: TrainConfig, checkpoint: Path) -> TrainState:
    """This rank's model with gradient buffers, its share of the optimizer, and the schedule."""
    hf = read_config(checkpoint)
    bf16 = config.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    mcore = transformer_config(
        hf,
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        calculate_per_token_loss=True,
    )
    model = build_model(hf, mcore, resolve_backend(config.backend), config.seq_length).to(device())
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=torch.cuda.is_available(),
        check_for_nan_in_grad=True,
    )
    model = DistributedDataParallel(mcore, ddp, Float16Module(mcore, model) if bf16 else model)
    mcore.finalize_model_grads_func = finalize_model_grads
    mcore.grad_scale_func = None
    if ddp.overlap_grad_reduce:
        mcore.no_sync_func = model.no_sync
    optimizer = build_optimizer(config, model)
    return TrainState(model, optimizer, build_schedule(config, optimizer))


def start(state: TrainState, output: Path, checkpoint: Path, facts: dict) -> None:
    """Put weights, and where a run is continued everything else, into `state`."""
    found = [newest(output) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found)
    before = found[0]
    if before is None:
        load_weights(state.model.module, checkpoint)
        state.optimizer.reload_model_params()
        return
    refuse_another_run(before, facts)
    load(state, before)
    if torch.distributed.get_rank() == 0:
        print(f"resumed from {before}", flush=True)


def train_step(
    state: TrainState, config: TrainConfig, data: PackedDataset, packs: list[int]
) -> tuple[float, int, float]:
    """One optimizer step on `packs`: loss per trained token, trained tokens, gradient norm before clipping."""
    state.model.train()
    state.model.zero_grad_buffer()
    state.optimizer.zero_grad()
    total, count = run_batch(state, config, data, packs, forward_only=False)
    _, grad_norm, _ = state.optimizer.step()
    return total / max(count, 1), count, float(grad_norm)


def evaluate(state: TrainState, config: TrainConfig, data: PackedDataset) -> float:
    """Loss per trained token of the first `eval_iters` batches of held-out data, in their order."""
    batches = min(config.eval_iters, -(-len(data) // config.global_batch_size))
    state.model.eval()
    with torch.no_grad():
        sums = [
            run_batch(state, config, data, data.in_order(i, config.global_batch_size), forward_only=True)
            for i in range(batches)
        ]
    total, count = map(sum, zip(*sums, strict=True))
    return total / max(count, 1)


def run_batch(
    state: TrainState, config: TrainConfig, data: PackedDataset, packs: list[int], forward_only: bool
) -> tuple[float, int]:
    """Forward, and backward, over one global batch: (sum of token losses, trained tokens) over all ranks."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = rank_share(packs, config.micro_batch_size, rank, ranks)
    batches: Iterator[dict[str, Tensor]] = (data.batch(micro_batch) for micro_batch in share)
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[state.model],
        num_microbatches=len(share),
        # The packs of a micro-batch lie one after the other in a single row.
        seq_length=config.seq_length * config.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _over_all_ranks(results)


def _over_all_ranks(results: list[Tensor]) -> tuple[float, int]:
    # Only last pipeline stages have results; tensor-parallel ranks all have the same ones.
    total = torch.zeros(2, dtype=torch.float64, device=device())
    if results and parallel_state.get_tensor_model_parallel_rank() == 0:
        total = torch.stack(results).sum(dim=0)
    torch.distributed.all_reduce(total)
    loss, count = total.tolist()
    return loss, int(count)


def _held_out(config: TrainConfig) -> PackedDataset | None:
    if not config.eval_data:
        return None
    return PackedDataset(TokenStore(existing(config.eval_data, "eval_data")), config.seq_length, config.seed)


def _log_line(record: dict, train_iters: int) -> str:
    line = (
        f"step {record['iteration']:>6}/{train_iters}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tokens/s"
    )
    return line + (f"  eval loss {record['eval_loss']:.4f}" if "eval_loss" in record else "")
