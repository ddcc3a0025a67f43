"""The output layer and the loss together, at the trained positions only.

Rows go through in chunks: a chunk's logits become its loss and, in the same memory, the gradient of its logits, which
is used up at once. So no [tokens, vocabulary] tensor is ever whole, and each of the three products (logits, gradient
of the hidden states, gradient of the weight) is done once. The vocabulary may be split over tensor-parallel ranks.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from rsft_lib.model.cpu_shim import fused

CHUNK = 3072  # most rows whose logits exist at one time: 0.9 GB for 151,936 words in bf16


class Targets(NamedTuple):
    """What is trained in a micro-batch: n of its t positions."""

    positions: Tensor
    """int64 [n], rising."""
    labels: Tensor
    """int64 [n]."""
    weights: Tensor
    """float32 [n]."""


class Loss(NamedTuple):
    """What the model returns for a micro-batch."""

    total: Tensor
    """Scalar float32, sum of weight * cross-entropy over the targets; the only one with a gradient."""
    log_probabilities: Tensor
    """float32 [n, 1 + watched]: of each label, then of the watched words at the same positions."""


def weighted_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    group: dist.ProcessGroup,
    vocabulary: int,
    watched: tuple[int, ...],
) -> Loss:
    """Cross-entropy of a linear output layer.

    The gradient of the weight is added to its `main_grad` in the forward pass, as that of `total` itself: whoever
    differentiates must start from `total` with a gradient of 1, as megatron-core's schedules do.

    Args:
        hidden: [t, h], the same on all tensor-parallel ranks; its gradient must be summed over them.
        weight: [v / TP, h], this rank's part of the rows; the last of all may be padding.
        group: the tensor-parallel ranks.
        vocabulary: rows that stand for words.
        watched: words whose probability is wanted besides.
    """
    first = group.rank() * weight.shape[0]
    words = [torch.full_like(targets.labels, word) for word in watched]  # filled on the GPU: nothing waits for it
    wanted = torch.stack([targets.labels, *words], dim=1) - first
    # Within a Function nobody knows whether gradients are wanted at all.
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    rows = hidden.index_select(0, targets.positions)  # [n, h]
    return Loss(*_Head.apply(rows, weight, wanted, targets.weights, group, vocabulary - first, differentiate))


class _Head(Function):
    @staticmethod
    def forward(ctx, hidden, weight, wanted, weights, group, words, differentiate):
        ctx.weight = weight
        gradients = _Gradients(hidden, weight) if differentiate else None
        log_probabilities = torch.empty(wanted.shape, dtype=torch.float32, device=hidden.device)
        for rows in _chunks(len(wanted)):
            logits = hidden[rows] @ weight.t()
            if words < len(weight):
                logits[:, max(words, 0) :] = -torch.inf
            log_sums = _over_all_ranks(log_sum_exp(logits), group)
            log_probabilities[rows] = _picked(logits, wanted[rows], group) - log_sums[:, None]
            if gradients:
                cross_entropy_backward_(logits, log_sums, wanted[rows, 0].contiguous(), weights[rows])
                gradients.add(rows, logits, hidden[rows], weight)
            del logits  # before the next ones are made
        if gradients:
            ctx.save_for_backward(gradients.of_hidden, gradients.of_weight)
        ctx.mark_non_differentiable(log_probabilities)
        return -(log_probabilities[:, 0] * weights).sum(), log_probabilities

    @staticmethod
    def backward(ctx, grad, _):
        of_hidden, of_weight = ctx.saved_tensors
        if of_weight is None:
            return of_hidden, _added(ctx.weight), *[None] * 5
        return of_hidden * grad, (of_weight * grad).to(ctx.weight.dtype), *[None] * 5


class _Gradients:
    """Sums of what the chunks contribute; the weight's goes to its `main_grad` where there is one."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.of_hidden = torch.empty_like(hidden)
        self.of_weight = None
        if not hasattr(weight, "main_grad"):
            self.of_weight = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, rows: slice, of_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        torch.mm(of_logits, weight, out=self.of_hidden[rows])
        add_product_(weight.main_grad if self.of_weight is None else self.of_weight, of_logits, hidden)


def _chunks(rows: int) -> list[slice]:
    """Equal parts of at most CHUNK rows."""
    count = -(-rows // CHUNK)
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def log_sum_exp(logits: Tensor) -> Tensor:
    """Of each row of [n, v], float32 [n]."""
    if logits.is_cuda:
        from rsft_lib.model.kernels import log_sum_exp  # triton is there only with CUDA

        return log_sum_exp(logits)
    return logits.float().logsumexp(-1)


def _over_all_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32 [n] of the whole vocabulary, from `log_sum_exp` of each rank's part."""
    if group.size() == 1:
        return own
    parts = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(parts, own, group=group)
    return parts.view(group.size(), -1).logsumexp(0)


def _picked(logits: Tensor, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32 [n, k]: the logits at `columns`, each from the rank that has it."""
    here = (columns >= 0) & (columns < logits.shape[1])
    picked = logits.gather(1, columns.where(here, 0)).float().where(here, 0)
    if group.size() > 1:
        dist.all_reduce(picked, group=group)
    return picked


def cross_entropy_backward_(logits: Tensor, log_sums: Tensor, labels: Tensor, weights: Tensor) -> None:
    """The gradient of sum(weights * cross-entropy), written over this rank's columns of the logits [n, v].

    Args:
        log_sums: float32 [n], over the whole vocabulary.
        labels: int64 [n], the column of the label; outside of 0 ... v - 1 where another rank holds it.
        weights: float32 [n].
    """
    here = ((labels >= 0) & (labels < logits.shape[1]))[:, None]
    columns = labels[:, None].where(here, 0)
    at_labels = _probabilities(logits.gather(1, columns), log_sums) - here.float()  # before it is rounded to bf16
    _weighted_probabilities_(logits, log_sums, weights)
    logits.scatter_(1, columns, (at_labels * weights[:, None]).to(logits.dtype))


@fused
def _weighted_probabilities_(logits: Tensor, log_sums: Tensor, weights: Tensor) -> None:
    logits.copy_(_probabilities(logits, log_sums) * weights[:, None])


def _probabilities(logits: Tensor, log_sums: Tensor) -> Tensor:
    return (logits.float() - log_sums[:, None]).exp()


def add_product_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [o, i] += grad [t, o]^T @ x [t, i], summed in float32 where `total` is."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), x)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.add_(grad.t() @ x)


def _added(parameter: Tensor) -> Tensor:
    """What autograd is given for a parameter whose gradient is in its `main_grad` already."""
    parameter.grad_added_to_main_grad = True
    # megatron-core marks a weight that another layer shares: what autograd gets is added to main_grad as well.
    return torch.zeros_like(parameter) if getattr(parameter, "zero_out_wgrad", False) else parameter.detach()
