"""The loss of a step: cross-entropy times weight, summed over trained tokens, over the sum of weights of the batch.

The sum of weights is known from the data before anything runs, so the gradients of all micro-batches and ranks are
added up as they are and divided once, in the optimizer. So neither packing nor the parallel layout changes a token's
weight, and weights need not be whole numbers.
"""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from torch import Tensor

from rsft_lib.host import device
from rsft_lib.model.attention import packed, share
from rsft_lib.model.head import Loss, Targets
from rsft_lib.training.tally import tally


def forward_step(batches: Iterator[dict[str, Tensor]], model):
    """Run one micro-batch through this rank's part of the model; the signature is that of mcore's schedules."""
    batch = next(batches)
    rank = parallel_state.get_context_parallel_rank()
    size = parallel_state.get_context_parallel_world_size()
    own = {name: share(rows, rank, size) for name, rows in batch.items() if name != "cu_seqlens"}
    positions = own["loss_mask"][0].nonzero()[:, 0]  # here, where the tensors are on the CPU and nothing waits for it
    targets = Targets(positions, own["labels"][0, positions], own["loss_mask"][0, positions])
    targets = Targets(*map(_send, targets))
    output = model(
        _send(own["tokens"]),
        _send(own["position_ids"]),
        None,
        labels=targets,
        packed_seq_params=packed(batch["cu_seqlens"].tolist(), device(), rank, size),
    )
    return output, partial(total_and_tally, kinds=_send(own["kinds"][0, positions]))


def total_and_tally(output: Loss, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What mcore's schedules want of a loss: a scalar to differentiate, a count (which is not used), and the log."""
    count = torch.tensor(len(kinds), dtype=torch.int, device=kinds.device)
    return output[0], count, tally(Loss(*output), kinds)


def _send(tensor: Tensor) -> Tensor:
    return tensor.to(device(), non_blocking=True)
