"""The arithmetic between matrix products: norms, SwiGLU, rotary positions, softmax.

Each function here is its own reference in plain PyTorch, computed in float32 and rounded once at the end. On CUDA the
Triton kernel of the same name in `kernels.py` does it in one pass over memory. A name that ends in `_` writes over its
arguments, as PyTorch's do.
"""

import torch
from torch import Tensor


def kernels_for(tensor: Tensor):
    """The module with the Triton kernels where `tensor` lies on a GPU, else None."""
    if not tensor.is_cuda:
        return None
    from rsft_lib.model import kernels  # triton is there only with CUDA

    return kernels


def add_rows_(total: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """total[places[i]] += rows[i], always in the same order: total [v, h], places int64 [t], rows [t, h]."""
    if total.is_cuda:
        return total.index_put_((places,), rows.to(total.dtype), accumulate=True)  # sorts; index_add_ would race
    return total.index_add_(0, places, rows.to(total.dtype))


def column_sums(x: Tensor) -> Tensor:
    """The sum of the rows of x [t, h], float32 [h]."""
    if x.is_cuda and x.dtype != torch.float32:  # a product with ones takes about half the time of `sum`
        return torch.mm(x.new_ones(1, len(x)), x, out_dtype=torch.float32)[0]
    return x.sum(0, dtype=torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of each row of x [t, h]: (x * rstd * weight [t, h], rstd float32 [t])."""
    if kernels := kernels_for(x):
        return kernels.rms_norm(x, weight, eps)
    rstd = torch.rsqrt(x.float().square().mean(-1) + eps)
    return scale_rows(x, rstd, weight), rstd


def scale_rows(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The output of `rms_norm` once more, from its input [t, h] and `rstd` [t]."""
    if kernels := kernels_for(x):
        return kernels.scale_rows(x, rstd, weight)
    return (x.float() * rstd[:, None] * weight.float()).to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients (of x [t, h], of weight float32 [h]) for the gradient [t, h] of `rms_norm`.

    `residual` [t, h] is added to the first: the gradient that reaches x past the norm.
    """
    if kernels := kernels_for(x):
        return kernels.rms_norm_backward(grad, x, rstd, weight, residual)
    grad, unit = grad.float(), x.float() * rstd[:, None]
    scaled = grad * weight.float()
    of_x = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * rstd[:, None]
    if residual is not None:
        of_x = of_x + residual
    return of_x.to(x.dtype), (grad * unit).sum(0)


def swiglu(projected: Tensor) -> Tensor:
    """[t, 2 f], gate and up side by side -> silu(gate) * up [t, f]."""
    if kernels := kernels_for(projected):
        return kernels.swiglu(projected)
    gate, up = projected.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(projected.dtype)


def swiglu_backward_(grad: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of `projected` [t, 2 f], output of `swiglu` [t, f]), written over `projected` and over `grad` [t, f].

    The output is computed again because here it costs a write, and keeping it from the forward pass f values a token.
    """
    if kernels := kernels_for(grad):
        return kernels.swiglu_backward_(grad, projected)
    gate, up = projected.float().chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    output = gate * sigmoid * up
    of_gate, of_up = grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid
    return projected.copy_(torch.cat([of_gate, of_up], dim=-1)), grad.copy_(output)


def rotate(qkv: Tensor, rotary: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the query-key-value projection and turn queries and keys by their positions.

    Args:
        qkv: [t, groups, heads of a group + 2, d]: of each group its queries, then its key, then its value.
        rotary: float32 [2, t, d / 2], cosine and sine of each token's position.

    Returns:
        query [t, heads, d], key and value [t, groups, d].
    """
    if kernels := kernels_for(qkv):
        return kernels.rotate(qkv, rotary, groups)
    query, key, value = qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)
    return _turn(query.flatten(1, 2), rotary, 1), _turn(key.squeeze(2), rotary, 1), value.squeeze(2).contiguous()


def rotate_backward(query: Tensor, key: Tensor, value: Tensor, rotary: Tensor) -> Tensor:
    """The gradient of `qkv` in `rotate`, from those of its three results."""
    if kernels := kernels_for(query):
        return kernels.rotate_backward(query, key, value, rotary)
    groups = key.shape[1]
    query = _turn(query, rotary, -1).unflatten(1, (groups, -1))
    return torch.cat([query, _turn(key, rotary, -1).unsqueeze(2), value.unsqueeze(2)], dim=2)


def _turn(x: Tensor, rotary: Tensor, direction: int) -> Tensor:
    cos, sin = rotary.unsqueeze(2)  # [t, 1, d / 2] each
    first, second = x.float().chunk(2, dim=-1)
    sin = direction * sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def log_sum_exp(logits: Tensor) -> Tensor:
    """log(sum(exp(row))), float32 [n], of logits [n, v]."""
    if kernels := kernels_for(logits):
        return kernels.log_sum_exp(logits)
    return logits.float().logsumexp(-1)


def cross_entropy_backward_(logits: Tensor, log_sums: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The gradient of sum(weights * cross-entropy), written over the logits [n, v].

    Args:
        log_sums: float32 [n], over the whole vocabulary, of which these v columns may be a part.
        labels: int64 [n], the column of the label; outside of 0 ... v - 1 where another part holds it.
        weights: float32 [n].
    """
    if kernels := kernels_for(logits):
        return kernels.cross_entropy_backward_(logits, log_sums, labels, weights)
    gradient = (logits.float() - log_sums[:, None]).exp()
    here = (labels >= 0) & (labels < logits.shape[1])
    gradient[here, labels[here]] -= 1
    return logits.copy_(gradient * weights[:, None])
