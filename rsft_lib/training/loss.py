"""The loss of a step: cross-entropy summed over trained tokens, divided by their number in the global batch.

megatron-core does the division: with `calculate_per_token_loss` a loss function returns a sum and a count, and
`finalize_model_grads` divides the gradient by the count over all micro-batches and ranks. So neither packing nor
the parallel layout changes a token's weight.
"""

from collections.abc import Iterator

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from rsft_lib.host import device


def forward_step(batches: Iterator[dict[str, Tensor]], model):
    """Run one micro-batch through this rank's part of the model; the signature is that of mcore's schedules."""
    batch = {name: tensor.to(device(), non_blocking=True) for name, tensor in next(batches).items()}
    output = model(
        batch["tokens"],
        batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_seq_params(batch["cu_seqlens"]),
    )
    return output, sum_and_count


def sum_and_count(token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[trained tokens] -> their sum, their number, and both, detached, as a float64 pair for the log."""
    total = token_losses.sum()
    count = torch.tensor(len(token_losses), dtype=torch.int, device=total.device)
    return total, count, torch.stack([total.detach().double(), count.double()])


def packed_seq_params(cu_seqlens: Tensor) -> PackedSeqParams:
    """Sample boundaries for attention and rotary positions, on every pipeline stage.

    `max_seqlen` must be the true maximum: where it equals the whole pack's length, megatron-core takes the
    rotary table for one of absolute positions and no longer restarts it (rope_utils._apply_rotary_pos_emb_thd).
    """
    longest = int(cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
