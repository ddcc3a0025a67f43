"""Gather the optimizer states of all data-parallel ranks on the CPU of the first one, for a checkpoint.

Replaces megatron-core's function, which misplaces everything after padding between two buckets (present if their sizes
are not divisible by the number of ranks and by 128), and needs 32 bytes per parameter to gather 12.
"""

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from rsft_lib.training.adam import MASTER, MOMENTS

STATES = ("param", *MOMENTS)  # megatron-core's names


def gather_states(
    optimizer: DistributedOptimizer, use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool
) -> dict | None:
    """`DistributedOptimizer.get_parameter_state_dp_zero` over gloo: a float32 tensor of each state by buffer and dtype.

    Parameters are placed by the buffer's `param_index_map`, so padding is kept.

    Args:
        empty_data: return meta tensors on every rank, as placeholders for loading.

    Returns:
        None on all ranks but the first, unless `empty_data`.
    """
    assert empty_data or (use_gloo_comm and not return_on_all_ranks), "unsupported; see LAYOUT in state.py"
    returned = empty_data or optimizer.data_parallel_group_gloo.rank() == 0
    gathered: dict = {"buckets_coalesced": True}
    for number, (buffer, buckets) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        (dtype,) = buckets
        # Zeroing touches the memory with all threads; otherwise the copy from the GPU would, page by page, at 1 GB/s.
        place = "meta" if empty_data else "cpu"
        states = {name: torch.zeros(buffer.numel, device=place) if returned else None for name in STATES}
        if not empty_data:
            for bucket, ranges in zip(buffer.buckets, buckets[dtype], strict=True):
                for name, whole in states.items():
                    _gather(optimizer, name, bucket, ranges["param_map"], whole)
        gathered[number] = {dtype: {**states, "numel_unpadded": buffer.numel_unpadded}}
    return gathered if returned else None


def _gather(optimizer: DistributedOptimizer, name: str, bucket, shards: dict, whole: torch.Tensor | None) -> None:
    """Gather the state `name` of a bucket's parameters from all ranks' `shards` into the first rank's `whole`."""
    group = optimizer.data_parallel_group_gloo
    numel = bucket.grad_data.numel()
    places = None if whole is None else list(whole[bucket.offset : bucket.offset + numel].chunk(group.size()))
    own = torch.empty(numel // group.size(), device="cpu") if places is None else places[0]
    for weight, ranges in shards.items():
        place = ranges["gbuf_local"]
        own[place.start : place.end].copy_(_state(optimizer, weight, name).flatten())
    if group.size() > 1:
        torch.distributed.gather(own, places, group=group, group_dst=0)


def _state(optimizer: DistributedOptimizer, weight: torch.nn.Parameter, name: str) -> torch.Tensor:
    number, place = optimizer.model_param_group_index_map[weight]
    adam = optimizer.optimizer
    shard = adam.param_groups[number]["params"][place]
    if name == "param":
        return adam.get_unscaled_state(shard, MASTER) if MASTER in adam.state[shard] else shard.detach()
    return adam.get_unscaled_state(shard, name)
