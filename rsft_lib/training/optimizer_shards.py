"""Each rank's shards of the master weights and moments, as parts of the tensors of a checkpoint.

A rank of the distributed optimizer updates a range of each flattened weight. megatron-core stores whole tensors, which
one rank gathers from all others before it writes them; here each rank writes the boxes of rows and columns that make
up its range, under the same names, so that a checkpoint still loads at any parallel size.
"""

import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from rsft_lib.checkpoint.sharded import Shard
from rsft_lib.training.adam import MASTER, MOMENTS

STATES = {"param": MASTER, **{name: name for name in MOMENTS}}  # megatron-core's names in checkpoints

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def optimizer_shards(optimizer: DistributedOptimizer, model: dict, *_) -> dict[int, list[Shard]]:
    """Replaces `DistributedOptimizer.sharded_param_state_fully_reshardable`.

    Args:
        model: the sharded state dict of the model, whose tensors are its parameters.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model)
    entries = {entry.data: entry for entry in nested_values(sharded)}
    ranges = (
        bucket["param_map"] for buckets in optimizer.gbuf_ranges for (maps,) in [buckets.values()] for bucket in maps
    )
    own = {weight: places["param"] for shards in ranges for weight, places in shards.items()}
    return {
        number: list(_shards(optimizer, weight, range_.start, range_.end, entries[weight]))
        for number, (weight, range_) in enumerate(own.items())
    }


def _shards(
    optimizer: DistributedOptimizer,
    weight: torch.nn.Parameter,
    start: int,
    end: int,
    entry: ShardedTensor | ShardedTensorFactory,
) -> Iterator[Shard]:
    """The shards of the elements `start` to `end` of a weight; with a factory, it consists of several tensors."""
    group, index = optimizer.model_param_group_index_map[weight]
    flat = optimizer.optimizer.param_groups[group]["params"][index]
    for tensor in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
        assert tensor.data.is_contiguous(), f"{tensor.key} is not a range of its parameter"
        first = tensor.data.storage_offset() - weight.storage_offset()
        low, high = max(start, first), min(end, first + tensor.data.numel())
        at = low - start  # in this rank's range
        for box in boxes(tensor.local_shape, low - first, high - first):
            part = slice(at, at + math.prod(box[1]))
            at = part.stop
            for name, state in STATES.items():
                yield _shard(
                    optimizer.optimizer, flat, state, part, f"optimizer.state.{name}.{tensor.key}", box, tensor
                )


def _shard(adam, flat: torch.Tensor, state: str, part: slice, key: str, box: Box, tensor: ShardedTensor) -> Shard:
    offset, shape = box
    stacked, place = tensor.global_offset[: tensor.prepend_axis_num], tensor.global_offset[tensor.prepend_axis_num :]
    return Shard(
        key,
        data=None,
        dtype=torch.float32 if state == MASTER else adam.state[flat][state].dtype,
        local_shape=shape,
        global_shape=tensor.global_shape,
        global_offset=(*stacked, *(a + b for a, b in zip(place, offset, strict=True))),
        axis_fragmentations=None,  # not a regular grid
        replica_id=(*tensor.replica_id[:2], 0),  # no other data-parallel rank has these elements
        prepend_axis_num=tensor.prepend_axis_num,
        allow_shape_mismatch=tensor.allow_shape_mismatch,
        get=lambda: adam.get_state(flat, state, part).view(shape),
        put=lambda value: adam.set_state(flat, state, value.flatten(), part),
    )


def boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """The boxes that make up the elements `start` to `end` of a flattened tensor, in order.

    >>> boxes((4, 3), 1, 11)
    [((0, 1), (1, 2)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    """
    if start >= end:
        return []
    row = math.prod(shape[1:])
    if len(shape) == 1:
        return [((start,), (end - start,))]
    first, last = -(-start // row), end // row  # whole rows
    if first > last:
        return _of_row(shape, last, start - last * row, end - last * row)
    whole = [((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))] if last > first else []
    before = _of_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    return before + whole + _of_row(shape, last, 0, end - last * row)


def _of_row(shape: tuple[int, ...], row: int, start: int, end: int) -> list[Box]:
    return [((row, *offset), (1, *sizes)) for offset, sizes in boxes(shape[1:], start, end)]
