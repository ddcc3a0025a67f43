"""AdamW with split master weights.

A float32 master weight is stored as its bf16 weight and the remaining 16 bits, so it costs two extra bytes instead of
four, and the update reads and writes every value once. It takes the place of Transformer Engine's FusedAdam in
megatron-core's distributed optimizer; with 16-bit moments, FusedAdam copies all of them to float32 at every step.
Update: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, as in torch.optim.AdamW.
"""

import torch
from torch import Tensor

from rsft_lib.model.cpu_shim import fused

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master_param"  # megatron-core's name; here int16, the lower bits of the float32 weight
LONGEST = 2**30  # elements of a run of tensors, so that a kernel can index them with 32 bits


class AdamW:
    """Weights and gradients are float32 or bf16; gradients are read from `grad`, for bf16 from `decoupled_grad`."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, moments: torch.dtype):
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.steps, self.scale = 0, 1.0
        for group in self.param_groups:
            weights = group["params"]
            self.state |= {weight: {} for weight in weights}
            for name in MOMENTS:
                self._add_state(weights, name, moments)
            self._add_state([weight for weight in weights if weight.dtype == torch.bfloat16], MASTER, torch.int16)

    def _add_state(self, weights: list[Tensor], name: str, dtype: torch.dtype) -> None:
        """Zeros for each weight, one after the other in memory."""
        sizes = [weight.numel() for weight in weights]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=weights[0].device if weights else None)
        for weight, part in zip(weights, flat.split(sizes), strict=True):
            self.state[weight][name] = part.view(weight.shape)

    @torch.no_grad()
    def step(self) -> None:
        """One update with the gradients multiplied by `scale`.

        Weights that lie one after the other in memory, as megatron-core's buffers have them, are updated together: a
        model with experts has thousands of small ones.
        """
        self.steps += 1
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.numel()]
            if not weights:  # all are on other ranks
                continue
            factors = self._factors(group["lr"], group["weight_decay"]).to(weights[0].device)
            rows = [(weight, self._gradient(weight), *self.state[weight].values()) for weight in weights]
            for run in runs(rows):
                weight, grad, first, second, *rest = map(joined, zip(*run, strict=True))
                adamw_(weight, rest[0] if rest else None, grad, first, second, factors)

    def _factors(self, lr: float, weight_decay: float) -> Tensor:
        """The factors of one step, for `adamw_`."""
        beta1, beta2 = self.betas
        rate, correction = lr / (1 - beta1**self.steps), 1 / (1 - beta2**self.steps)
        factors = [self.scale, 1 - lr * weight_decay, rate, correction, beta1, 1 - beta1, beta2, 1 - beta2, self.eps]
        return torch.tensor(factors)

    @staticmethod
    def _gradient(weight: Tensor) -> Tensor:
        return weight.decoupled_grad if weight.dtype == torch.bfloat16 else weight.grad

    def _weights(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    # Called by megatron-core's distributed optimizer to save and load. The step is stored where torch's AdamW and where
    # Transformer Engine's has it, since megatron-core reads both.

    def state_dict(self) -> dict:
        numbers = iter(range(len(self._weights())))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]], "step": self.steps}
            for group in self.param_groups
        ]
        return {"state": {0: {"step": torch.tensor(float(self.steps))}}, "param_groups": groups}

    def load_state_dict(self, loaded: dict) -> None:
        for group, saved in zip(self.param_groups, loaded["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name not in ("params", "step")})
            self.steps = int(saved["step"])

    def reset(self) -> None:
        """Forget all steps; float32 master weights become the bf16 weights."""
        self.steps = 0
        for states in self.state.values():
            for value in states.values():
                value.zero_()

    def get_state(self, weight: Tensor, name: str, part: slice = slice(None)) -> Tensor:
        """Elements of a state of a flat weight, moments as they are; MASTER is the full-precision weight."""
        if name != MASTER:
            return self.state[weight][name][part]
        rest = self.state[weight].get(MASTER)
        return weight.detach()[part] if rest is None else join(weight.detach()[part], rest[part])

    @torch.no_grad()
    def set_state(self, weight: Tensor, name: str, value: Tensor, part: slice = slice(None)) -> None:
        """Set elements of a state, MASTER from float32, moments from any dtype; MASTER also sets the weight."""
        if name == MASTER and MASTER in self.state[weight]:
            split_(value.to(weight.device), weight[part], self.state[weight][MASTER][part])
        else:
            (weight if name == MASTER else self.state[weight][name])[part].copy_(value)


@fused
def adamw_(weight: Tensor, rest: Tensor | None, grad: Tensor, first: Tensor, second: Tensor, factors: Tensor) -> None:
    """One AdamW step of one tensor, computed in float32; updates `weight`, `rest` and the moments in place.

    Args:
        weight: float32, or bf16 with the lower bits in `rest`, int16.
        first, second: the moments, float32 or bf16.
        factors: float32 [9], from `AdamW._factors`.
    """
    scale, shrink, rate, correction, beta1, rest1, beta2, rest2, eps = factors.unbind()
    grad = grad.float() * scale
    mean = first.float() * beta1 + grad * rest1
    square = second.float() * beta2 + grad * grad * rest2
    first.copy_(mean)
    second.copy_(square)
    whole = weight if rest is None else join(weight, rest)
    whole = whole * shrink - mean * rate / ((square * correction).sqrt() + eps)
    if rest is None:
        weight.copy_(whole)
    else:
        split_(whole, weight, rest)


def runs(rows: list[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Group consecutive rows whose tensors all begin where those of the row before end."""
    found: list[list[tuple[Tensor, ...]]] = []
    size = 0
    for row in rows:
        size += row[0].numel()
        if found and size <= LONGEST and all(map(_follows, row, found[-1][-1])):
            found[-1].append(row)
        else:
            found.append([row])
            size = row[0].numel()
    return found


def _follows(tensor: Tensor, before: Tensor) -> bool:
    same = tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
    return same and tensor.storage_offset() == before.storage_offset() + before.numel() and before.is_contiguous()


def joined(tensors: tuple[Tensor, ...]) -> Tensor:
    """A flat view of tensors that lie one after the other in memory."""
    return tensors[0].as_strided((sum(tensor.numel() for tensor in tensors),), (1,))


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """Restore the float32 that `split_` split into bf16 and int16."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split_(whole: Tensor, weight: Tensor, rest: Tensor) -> None:
    """Split float32 into the nearest bf16, ties away from zero, and the remaining bits as int16."""
    bits = whole.contiguous().view(torch.int32)
    upper = (bits + 0x8000) >> 16
    weight.view(torch.int16).copy_(upper)
    rest.copy_(bits - (upper << 16))
