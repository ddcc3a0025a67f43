"""The loss of a step: weighted cross-entropy, summed over the trained tokens of a batch, divided by the sum of weights.

Gradients of all micro-batches and ranks are summed without normalization, the weights are summed along with the
losses, and the optimizer divides once. So a token's weight depends on neither packing nor parallel sizes, and need not
be an integer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rsft_lib.common.device import device
from rsft_lib.model.attention import Samples, samples_of
from rsft_lib.model.loss_head import Loss, Targets
from rsft_lib.training.loss_stats import tally


class MicroBatch(NamedTuple):
    """One context-parallel rank's part of a micro-batch."""

    tokens: Tensor
    position_ids: Tensor
    targets: Targets
    kinds: Tensor
    """int64 [n], the kind of each target."""
    samples: Samples
    """Of the whole micro-batch."""
    padding: Tensor
    """bool [1, t], True at positions that belong to no sample."""
    weight: Tensor
    """Scalar float32, sum of the loss weights on all context-parallel ranks."""

    def each(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Apply `function` to every tensor."""
        return _each(self, function)


def micro_batch(batch: dict[str, Tensor], rank: int, size: int) -> MicroBatch:
    """Shard the tensors of `PackedDataset.batch` for a context-parallel rank, on the CPU."""
    own = {name: rows.chunk(size, dim=1)[rank] for name, rows in batch.items() if name != "cu_seqlens"}
    positions = own["loss_mask"][0].nonzero()[:, 0]
    targets = Targets(positions, own["labels"][0, positions], own["loss_mask"][0, positions])
    samples = samples_of(batch["cu_seqlens"].tolist())
    kinds, weight = own["kinds"][0, positions], batch["loss_mask"].sum()
    return MicroBatch(own["tokens"], own["position_ids"], targets, kinds, samples, own["padding"], weight)


def forward_step(batches: Iterator[MicroBatch], model):
    """Run one micro-batch through this rank's part of the model; called by megatron-core's schedules."""
    batch = next(batches).each(lambda tensor: tensor.to(device(), non_blocking=True))
    output = model(
        batch.tokens, batch.position_ids, None, labels=batch.targets, samples=batch.samples,
        padding_mask=batch.padding, loss_weight=batch.weight,
    )  # fmt: skip
    return output, partial(total_and_tally, weights=batch.targets.weights, kinds=batch.kinds)


def total_and_tally(output: Loss, weights: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss for megatron-core's schedules: a differentiable scalar, a token count (unused), and the tally."""
    count = torch.zeros((), dtype=torch.int, device=kinds.device)
    return output[0], count, tally(Loss(*output), weights, kinds)


def _each(value, function: Callable[[Tensor], Tensor]):
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, tuple):
        return value
    parts = (_each(part, function) for part in value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
