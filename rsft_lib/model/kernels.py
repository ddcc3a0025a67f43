"""log-sum-exp of each row of logits in Triton, reading them once; torch.compile's kernel reads them twice."""

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
