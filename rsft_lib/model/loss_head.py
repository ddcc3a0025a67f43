"""Fused output layer and cross-entropy, at the trained positions only.

Rows are processed in chunks: a chunk's logits yield its loss and, in place, the gradient of the logits, which is
consumed immediately. No full [tokens, vocabulary] tensor is allocated, and each of the three matrix products (logits,
gradients of hidden states and weight) is computed once. The vocabulary may be sharded over tensor-parallel ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from rsft_lib.model.cpu_shim import fused
from rsft_lib.model.shapes import CHUNK


class Targets(NamedTuple):
    """The trained positions of a micro-batch: n of its t."""

    positions: Tensor
    """int64 [n], ascending."""
    labels: Tensor
    """int64 [n]."""
    weights: Tensor
    """float32 [n]."""


class Loss(NamedTuple):
    """The model's output for a micro-batch."""

    total: Tensor
    """Scalar float32, sum of weight * cross-entropy over the targets; the only differentiable one."""
    log_probabilities: Tensor
    """float32 [n, 1 + watched]: of each label, then of the watched tokens at the same positions."""


def weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    group: dist.ProcessGroup,
    vocabulary: int,
    watched: tuple[int, ...],
) -> Loss:
    """Weighted cross-entropy of a linear output layer.

    The gradient of the weight is added to its `main_grad` in the forward pass, as the gradient of `total` itself:
    backward must start from `total` with a gradient of 1, as megatron-core's schedules do.

    Args:
        hidden: [t, h], the same on all tensor-parallel ranks; its gradient must be summed over them.
        weight: [v / TP, h], this rank's rows; the last rows of the whole weight may be padding.
        group: the tensor-parallel ranks.
        vocabulary: number of rows that belong to tokens, without padding.
        watched: tokens whose log probability is also returned.
    """
    first = group.rank() * weight.shape[0]
    others = [torch.full_like(targets.labels, token) for token in watched]  # created on the GPU: no synchronization
    tokens = torch.stack([targets.labels, *others], dim=1) - first
    # Evaluated here, since gradients are always disabled within a Function's forward.
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    rows = hidden.index_select(0, targets.positions)  # [n, h]
    return Loss(*_Head.apply(rows, weight, tokens, targets.weights, group, vocabulary - first, differentiate))


class _Head(Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens, weights, group, vocabulary, differentiate):
        ctx.weight = weight
        gradients = _Gradients(hidden, weight) if differentiate else None
        log_probabilities = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(tokens)):
            logits = hidden[rows] @ weight.t()
            if vocabulary < len(weight):
                logits[:, max(vocabulary, 0) :] = -torch.inf
            log_sums = _over_all_ranks(log_sum_exp(logits), group)
            log_probabilities[rows] = _logits_at(logits, tokens[rows], group) - log_sums[:, None]
            if gradients:
                cross_entropy_backward_(logits, log_sums, tokens[rows, 0].contiguous(), weights[rows])
                gradients.add(rows, logits, hidden[rows], weight)
            del logits  # before the next chunk's are allocated
        if gradients:
            ctx.save_for_backward(gradients.of_hidden, gradients.of_weight)
        ctx.mark_non_differentiable(log_probabilities)
        return -(log_probabilities[:, 0] * weights).sum(), log_probabilities

    @staticmethod
    def backward(ctx, grad, _):
        of_hidden, of_weight = ctx.saved_tensors
        if of_weight is None:
            return of_hidden, _gradient_added(ctx.weight), *[None] * 5
        return of_hidden * grad, (of_weight * grad).to(ctx.weight.dtype), *[None] * 5


class _Gradients:
    """Accumulates the gradients of the chunks; the weight's into its `main_grad` if it has one."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.of_hidden = torch.empty_like(hidden)
        self.of_weight = None
        if not hasattr(weight, "main_grad"):
            self.of_weight = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, rows: slice, of_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        torch.mm(of_logits, weight, out=self.of_hidden[rows])
        add_product_(weight.main_grad if self.of_weight is None else self.of_weight, of_logits, hidden)


def _chunks(rows: int) -> list[slice]:
    """Equal chunks of at most CHUNK rows."""
    count = -(-rows // CHUNK)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def log_sum_exp(logits: Tensor) -> Tensor:
    """logsumexp of each row of [n, v], float32 [n]."""
    if logits.is_cuda:
        from rsft_lib.model.kernels import log_sum_exp  # triton requires CUDA

        return log_sum_exp(logits)
    return logits.float().logsumexp(-1)


def _over_all_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32 [n] over the whole vocabulary, from `log_sum_exp` of each rank's shard."""
    if group.size() == 1:
        return own
    parts = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(parts, own, group=group)
    return parts.view(group.size(), -1).logsumexp(0)


def _logits_at(logits: Tensor, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32 [n, k]: the logits at `columns`, each from the rank that holds it."""
    local = (columns >= 0) & (columns < logits.shape[1])
    values = logits.gather(1, columns.where(local, 0)).float().where(local, 0)
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


def cross_entropy_backward_(logits: Tensor, log_sums: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Overwrite this rank's columns of the logits [n, v] with the gradient of sum(weights * cross-entropy).

    Args:
        log_sums: float32 [n], over the whole vocabulary.
        labels: int64 [n], the column of the label; outside 0 ... v - 1 if another rank holds it.
        weights: float32 [n].
    """
    local = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    columns = labels[:, None].where(local, 0)
    at_labels = _probabilities(logits.gather(1, columns), log_sums) - local.float()  # before rounding to bf16
    _weighted_probabilities_(logits, log_sums, weights)
    logits.scatter_(1, columns, (at_labels * weights[:, None]).to(logits.dtype))


@fused
def _weighted_probabilities_(logits: Tensor, log_sums: Tensor, weights: Tensor) -> None:
    logits.copy_(_probabilities(logits, log_sums) * weights[:, None])


def _probabilities(logits: Tensor, log_sums: Tensor) -> Tensor:
    return (logits.float() - log_sums[:, None]).exp()


def add_product_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [o, i] += grad [t, o]^T @ x [t, i], accumulated in the dtype of `total`."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), x)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.add_(grad.t() @ x)


def _gradient_added(parameter: Tensor) -> Tensor:
    """A placeholder gradient for autograd: the real one is already in the parameter's `main_grad`."""
    parameter.grad_added_to_main_grad = True
    # For a weight shared with another layer (marked by megatron-core), autograd's gradient is added to main_grad too.
    return torch.zeros_like(parameter) if getattr(parameter, "zero_out_wgrad", False) else parameter.detach()
