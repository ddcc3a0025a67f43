"""Triton kernels: what `elementwise.py` says, in one pass over memory each.

All of them are bound by memory, so each loads a value once, computes in float32 and stores once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, rstd_ptr, eps, width, KNOWN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if KNOWN:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x) / width + eps)
        tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, x * rstd * weight, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    _rms_norm[(rows,)](x, weight, y, rstd, eps, width, KNOWN=False, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return y, rstd


def scale_rows(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    rows, width = x.shape
    y = torch.empty_like(x)
    _rms_norm[(rows,)](x, weight, y, rstd, 0.0, width, KNOWN=True, BLOCK=triton.next_power_of_2(width), num_warps=4)
    return y


@triton.jit
def _rms_norm_backward(
    grad_ptr, x_ptr, rstd_ptr, weight_ptr, residual_ptr, of_x_ptr, of_weight_ptr, rows, width,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (columns < width)[None, :]
        at = row.to(tl.int64) * width + columns[None, :]  # 16,384 rows of 151,936 are more than int32 counts
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        unit = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * rstd
        scaled = grad * weight
        of_x = (scaled - unit * (tl.sum(scaled * unit, axis=1)[:, None] / width)) * rstd
        if RESIDUAL:
            of_x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(of_x_ptr + at, of_x, mask=mask)
        of_weight += grad * unit
    sums = tl.sum(of_weight, axis=0)
    tl.store(of_weight_ptr + tl.program_id(0) * width + columns, sums, mask=columns < width)


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    programs = min(rows, 528)  # each sums the weight's gradient over its rows; what they find is added up below
    of_x, partial = torch.empty_like(x), torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs,)](
        grad, x, rstd, weight, residual, of_x, partial, rows, width,
        RESIDUAL=residual is not None, ROWS=1, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return of_x, partial.sum(0)


@triton.jit
def _swiglu(projected_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate = tl.load(projected_ptr + row * 2 * width + columns, mask=mask).to(tl.float32)
    up = tl.load(projected_ptr + row * 2 * width + width + columns, mask=mask).to(tl.float32)
    tl.store(y_ptr + row * width + columns, gate * tl.sigmoid(gate) * up, mask=mask)


def swiglu(projected: Tensor) -> Tensor:
    rows, width = projected.shape[0], projected.shape[1] // 2
    y = torch.empty(rows, width, dtype=projected.dtype, device=projected.device)
    _swiglu[(rows, triton.cdiv(width, 2048))](projected, y, width, BLOCK=2048, num_warps=8)
    return y


@triton.jit
def _swiglu_backward(grad_ptr, projected_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    grad_at, gate_at = grad_ptr + row * width + columns, projected_ptr + row * 2 * width + columns
    grad = tl.load(grad_at, mask=mask).to(tl.float32)
    gate = tl.load(gate_at, mask=mask).to(tl.float32)
    up = tl.load(gate_at + width, mask=mask).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(gate_at, grad * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=mask)
    tl.store(gate_at + width, grad * gate * sigmoid, mask=mask)
    tl.store(grad_at, gate * sigmoid * up, mask=mask)


def swiglu_backward_(grad: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = grad.shape
    _swiglu_backward[(rows, triton.cdiv(width, 2048))](grad, projected, width, BLOCK=2048, num_warps=8)
    return projected, grad


@triton.jit
def _rotate(
    qkv_ptr, query_ptr, key_ptr, value_ptr, rotary_ptr, tokens, slots,
    GROUPS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    rows, columns = (
        tl.arange(0, ROWS)[:, None],
        tl.arange(0, BLOCK)[None, :],
    )  # a row is a head: q ... q k v, q ... q k v
    group, slot = rows // slots, rows % slots
    inside = (rows < GROUPS * slots) & (columns < HALF)
    is_query, is_key, is_value = slot < slots - 2, slot == slots - 2, slot == slots - 1
    cos = tl.load(rotary_ptr + token * HALF + columns, mask=columns < HALF, other=0.0)
    sin = tl.load(rotary_ptr + (tokens + token) * HALF + columns, mask=columns < HALF, other=0.0)
    cos, sin = tl.where(is_value, 1.0, cos), tl.where(is_value, 0.0, sin)

    mixed = qkv_ptr + (token * GROUPS * slots + rows) * 2 * HALF + columns
    query = query_ptr + ((token * GROUPS + group) * (slots - 2) + slot) * 2 * HALF + columns
    key = key_ptr + (token * GROUPS + group) * 2 * HALF + columns
    value = value_ptr + (token * GROUPS + group) * 2 * HALF + columns
    if BACKWARD:
        first = tl.load(query, mask=inside & is_query, other=0.0).to(tl.float32)
        first += tl.load(key, mask=inside & is_key, other=0.0).to(tl.float32)
        first += tl.load(value, mask=inside & is_value, other=0.0).to(tl.float32)
        second = tl.load(query + HALF, mask=inside & is_query, other=0.0).to(tl.float32)
        second += tl.load(key + HALF, mask=inside & is_key, other=0.0).to(tl.float32)
        second += tl.load(value + HALF, mask=inside & is_value, other=0.0).to(tl.float32)
        tl.store(mixed, first * cos + second * sin, mask=inside)
        tl.store(mixed + HALF, second * cos - first * sin, mask=inside)
    else:
        first = tl.load(mixed, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(mixed + HALF, mask=inside, other=0.0).to(tl.float32)
        first, second = first * cos - second * sin, second * cos + first * sin
        tl.store(query, first, mask=inside & is_query)
        tl.store(key, first, mask=inside & is_key)
        tl.store(value, first, mask=inside & is_value)
        tl.store(query + HALF, second, mask=inside & is_query)
        tl.store(key + HALF, second, mask=inside & is_key)
        tl.store(value + HALF, second, mask=inside & is_value)


def rotate(qkv: Tensor, rotary: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, _, slots, width = qkv.shape
    query = torch.empty(tokens, groups * (slots - 2), width, dtype=qkv.dtype, device=qkv.device)
    key, value = (torch.empty(tokens, groups, width, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    _launch_rotate(qkv, query, key, value, rotary, slots, backward=False)
    return query, key, value


def rotate_backward(query: Tensor, key: Tensor, value: Tensor, rotary: Tensor) -> Tensor:
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    tokens, groups, width = key.shape
    slots = query.shape[1] // groups + 2
    qkv = torch.empty(tokens, groups, slots, width, dtype=query.dtype, device=query.device)
    _launch_rotate(qkv, query, key, value, rotary, slots, backward=True)
    return qkv


def _launch_rotate(qkv, query, key, value, rotary, slots, backward: bool) -> None:
    tokens, groups, width = key.shape
    rows, block = triton.next_power_of_2(groups * slots), triton.next_power_of_2(width // 2)
    _rotate[(tokens,)](
        qkv, query, key, value, rotary, tokens, slots,
        GROUPS=groups, HALF=width // 2, ROWS=rows, BLOCK=block, BACKWARD=backward, num_warps=4,
    )  # fmt: skip


@triton.jit
def _log_sum_exp(logits_ptr, sums_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total = float("-inf"), 0.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * width + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher))
        top = higher
    tl.store(sums_ptr + row, top + tl.log(total))


def log_sum_exp(logits: Tensor) -> Tensor:
    rows, width = logits.shape
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _log_sum_exp[(rows,)](logits, sums, width, BLOCK=8192, num_warps=8)
    return sums


@triton.jit
def _cross_entropy_backward(logits_ptr, sums_ptr, labels_ptr, weights_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * width + columns
    x = tl.load(at, mask=columns < width, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(sums_ptr + row))
    gradient = tl.where(columns == tl.load(labels_ptr + row), probability - 1, probability)
    tl.store(at, gradient * tl.load(weights_ptr + row), mask=columns < width)


def cross_entropy_backward_(logits: Tensor, log_sums: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, 4096))
    _cross_entropy_backward[grid](logits, log_sums, labels, weights, width, BLOCK=4096, num_warps=8)
    return logits
