"""`adam.adamw_` as a Triton kernel: every number is read and written once."""

import triton
import triton.language as tl


@triton.jit
def _adamw(
    weight_ptr, rest_ptr, grad_ptr, first_ptr, second_ptr, size,
    scale, shrink, rate, beta1, beta2, correction, eps, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    grad = tl.load(grad_ptr + at, mask=mask).to(tl.float32) * scale
    first = beta1 * tl.load(first_ptr + at, mask=mask).to(tl.float32) + (1 - beta1) * grad
    second = beta2 * tl.load(second_ptr + at, mask=mask).to(tl.float32) + (1 - beta2) * grad * grad
    tl.store(first_ptr + at, first, mask=mask)
    tl.store(second_ptr + at, second, mask=mask)
    weight = tl.load(weight_ptr + at, mask=mask)
    if SPLIT:
        upper = weight.to(tl.int16, bitcast=True).to(tl.int32)
        weight = ((upper << 16) + tl.load(rest_ptr + at, mask=mask).to(tl.int32)).to(tl.float32, bitcast=True)
    weight = weight * shrink - rate * first / (tl.sqrt(second * correction) + eps)
    if SPLIT:
        bits = weight.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(rest_ptr + at, (bits - (upper << 16)).to(tl.int16), mask=mask)
        weight = upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(weight_ptr + at, weight, mask=mask)


def adamw_(weight, rest, grad, first, second, update) -> None:
    size, block = weight.numel(), 2048
    if size == 0:  # this rank has none of it
        return
    _adamw[(triton.cdiv(size, block),)](
        weight, rest, grad, first, second, size,
        update.scale, 1 - update.lr * update.weight_decay, update.lr / (1 - update.beta1**update.step),
        update.beta1, update.beta2, 1 / (1 - update.beta2**update.step), update.eps,
        SPLIT=rest is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip
