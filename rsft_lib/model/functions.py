"""The matrix products of a layer with what surrounds them, differentiated by hand.

Against one autograd node per operation this keeps less for the backward pass (SwiGLU, and norms if asked, are computed
again there, which costs memory traffic but no matrix product) and adds gradients straight into DDP's `main_grad`.
Each works on rows [t, h]: the tokens of a micro-batch one below the other.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from rsft_lib.model.elementwise import (
    add_rows_,
    column_sums,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    scale_rows,
    swiglu,
    swiglu_backward_,
)


class TensorParallel:
    """How rows move between the ranks that share a layer; with `sequence`, between products each holds its share."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool):
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.sequence = sequence and self.size > 1

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of every rank, before a product with weights that are split by output; [t / size, h] -> [t, h]."""
        if not self.sequence:
            return rows
        whole = rows.new_empty(rows.shape[0] * self.size, *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous(), group=self.group)
        return whole

    def reduce(self, rows: Tensor) -> Tensor:
        """The sum over all ranks, after a product with weights that are split by input; [t, h] -> [t / size, h]."""
        if self.size == 1:
            return rows
        if not self.sequence:
            dist.all_reduce(rows, group=self.group)
            return rows
        share = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        dist.reduce_scatter_tensor(share, rows.contiguous(), group=self.group)
        return share


class Embedding(Function):
    """Rows of a table [v / TP, h] for tokens int64 [t]; `first` is the first word of this rank's part."""

    @staticmethod
    def forward(ctx, tokens, table, first, parallel):
        ctx.table, ctx.parallel = table, parallel
        if parallel.size == 1:
            ctx.save_for_backward(tokens, None)
            return table[tokens]
        own = tokens - first
        elsewhere = (own < 0) | (own >= len(table))
        own = own.masked_fill(elsewhere, 0)
        ctx.save_for_backward(own, elsewhere)
        return parallel.reduce(table[own].masked_fill(elsewhere[:, None], 0))

    @staticmethod
    def backward(ctx, grad):
        (own, elsewhere), table = ctx.saved_tensors, ctx.table
        grad = ctx.parallel.gather(grad)
        if elsewhere is not None:
            grad = grad.masked_fill(elsewhere[:, None], 0)
        if not table.requires_grad:
            return None, None, None, None
        if hasattr(table, "main_grad"):
            add_rows_(table.main_grad, own, grad)
            return None, added(table), None, None
        return None, add_rows_(torch.zeros_like(table), own, grad), None, None


class Rows(Function):
    """Some rows of x, no row twice: its gradient is a copy, where that of indexing would be a sum in any order."""

    @staticmethod
    def forward(ctx, x, positions):
        ctx.save_for_backward(positions)
        ctx.shape = x.shape
        return x.index_select(0, positions)

    @staticmethod
    def backward(ctx, grad):
        (positions,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).index_copy_(0, positions, grad), None


class Norm(Function):
    """rms_norm(x)."""

    @staticmethod
    def forward(ctx, x, norm, eps):
        normed, rstd = rms_norm(x, norm, eps)
        ctx.save_for_backward(x, rstd)
        ctx.norm = norm
        return normed

    @staticmethod
    def backward(ctx, grad):
        x, rstd = ctx.saved_tensors
        of_x, of_norm = rms_norm_backward(grad.contiguous(), x, rstd, ctx.norm)
        return of_x, gradient(ctx.norm, of_norm), None


class NormLinear(Function):
    """(rms_norm(x) @ weight^T + bias, x), for a weight that is split over the ranks by its output.

    Who adds x to something later takes it from here: then its gradient is added where the norm's is computed. With
    `recompute` the norm is computed again, not kept.
    """

    @staticmethod
    def forward(ctx, x, norm, weight, bias, eps, parallel, recompute):
        normed, rstd = rms_norm(x, norm, eps)
        ctx.save_for_backward(x, rstd, None if recompute else normed)
        ctx.parameters, ctx.parallel = (norm, weight, bias), parallel
        return torch.nn.functional.linear(parallel.gather(normed), weight, bias), x.view_as(x)

    @staticmethod
    def backward(ctx, grad, past):
        (x, rstd, normed), (norm, weight, bias) = ctx.saved_tensors, ctx.parameters
        normed = ctx.parallel.gather(scale_rows(x, rstd, norm) if normed is None else normed)
        of_normed = ctx.parallel.reduce(grad @ weight)
        of_weight = product_gradient(weight, grad, normed)
        of_bias = None if bias is None else gradient(bias, column_sums(grad))
        of_x, of_norm = rms_norm_backward(of_normed, x, rstd, norm, residual=past.contiguous())
        return of_x, gradient(norm, of_norm), of_weight, of_bias, None, None, None


class Linear(Function):
    """x @ weight^T, for a weight that is split over the ranks by its input."""

    @staticmethod
    def forward(ctx, x, weight, parallel):
        ctx.save_for_backward(x)
        ctx.weight, ctx.parallel = weight, parallel
        return parallel.reduce(x @ weight.t())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = ctx.parallel.gather(grad.contiguous())
        return grad @ ctx.weight, product_gradient(ctx.weight, grad, x), None


class Mlp(Function):
    """x + swiglu(rms_norm(x) @ first^T) @ second^T; with `recompute` what it can compute again is not kept."""

    @staticmethod
    def forward(ctx, x, norm, first, second, eps, parallel, recompute):
        normed, rstd = rms_norm(x, norm, eps)
        projected = parallel.gather(normed) @ first.t()
        ctx.save_for_backward(x, rstd, *((None, None) if recompute else (normed, projected)))
        ctx.parameters, ctx.parallel = (norm, first, second), parallel
        return parallel.reduce(swiglu(projected) @ second.t()).add_(x)

    @staticmethod
    def backward(ctx, grad):
        (x, rstd, normed, projected), (norm, first, second) = ctx.saved_tensors, ctx.parameters
        parallel, grad = ctx.parallel, grad.contiguous()
        normed = parallel.gather(scale_rows(x, rstd, norm) if normed is None else normed)
        if projected is None:
            projected = normed @ first.t()
        of_output = parallel.gather(grad)
        of_projected, hidden = swiglu_backward_(of_output @ second, projected)
        of_second = product_gradient(second, of_output, hidden)
        del hidden
        of_normed = parallel.reduce(of_projected @ first)
        of_first = product_gradient(first, of_projected, normed)
        of_x, of_norm = rms_norm_backward(of_normed, x, rstd, norm, residual=grad)
        return of_x, gradient(norm, of_norm), of_first, of_second, None, None, None


class SwiGlu(Function):
    """`elementwise.swiglu` by itself."""

    @staticmethod
    def forward(ctx, projected):
        ctx.save_for_backward(projected)
        return swiglu(projected)

    @staticmethod
    def backward(ctx, grad):
        (projected,) = ctx.saved_tensors
        of_projected, _ = swiglu_backward_(grad.contiguous(), projected)
        return of_projected


class Rotate(Function):
    """`elementwise.rotate` with its gradient."""

    @staticmethod
    def forward(ctx, qkv, rotary, groups):
        ctx.save_for_backward(rotary)
        return rotate(qkv, rotary, groups)

    @staticmethod
    def backward(ctx, query, key, value):
        (rotary,) = ctx.saved_tensors
        return rotate_backward(query, key, value, rotary), None, None


def product_gradient(weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """What autograd is given for the weight [o, i] of a product, from grad [t, o] and x [t, i].

    Where DDP keeps a `main_grad`, the gradient is added there in its precision. autograd then gets the weight's own
    memory under another name: a gradient of the right shape that costs nothing, which DDP's hook throws away.
    """
    if not weight.requires_grad:
        return None
    if not hasattr(weight, "main_grad"):
        return grad.t() @ x
    add_product_(weight.main_grad, grad, x)
    return added(weight)


def gradient(parameter: Tensor, grad: Tensor) -> Tensor | None:
    """What autograd is given for a small parameter, from its float32 gradient; see `product_gradient`."""
    if not parameter.requires_grad:
        return None
    if not hasattr(parameter, "main_grad"):
        return grad.to(parameter.dtype)
    parameter.main_grad.add_(grad)
    return added(parameter)


def add_product_(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [o, i] += grad [t, o]^T @ x [t, i], summed in float32 where `total` is."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.t(), x)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.add_(grad.t() @ x)


def added(parameter: Tensor) -> Tensor:
    """What autograd is given for a parameter whose gradient is in its `main_grad` already."""
    parameter.grad_added_to_main_grad = True
    # megatron-core marks a weight that another layer shares: what autograd gets is added to main_grad as well.
    return torch.zeros_like(parameter) if getattr(parameter, "zero_out_wgrad", False) else parameter.detach()
