"""Triton kernels of the loss head: what `head.py` says in plain PyTorch, in one pass over the logits each."""

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def cross_entropy_backward_(logits: Tensor, log_sums: Tensor, labels: Tensor, weights: Tensor) -> None:
    rows, width = logits.shape
    grid = (rows, triton.cdiv(width, 4096))
    _cross_entropy_backward[grid](logits, log_sums, labels, weights, width, BLOCK=4096, num_warps=8)
