"""The router of mixture-of-experts layers: megatron-core's, with a count of each expert's tokens and an auxiliary loss.

Every token goes to its `num_experts_per_tok` experts, and none is dropped. Padding is routed as well, since it takes
part in the matrix products of a pack, but not counted. megatron-core's own auxiliary losses are not used: their scale
differs between versions and assumes that the loss is divided by the number of all tokens.
"""

from collections import deque
from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler, TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Chooses the experts of every token; `load` is the number of tokens of each since it was last set to 0."""

    loss_weight: Tensor | float = 1.0
    """Sum of the loss weights of the current micro-batch, with which its auxiliary loss is weighted."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)
        self.to_recompute: deque = deque()  # loss weights of micro-batches whose routing is computed a second time

    def gating(self, input: Tensor) -> Tensor:
        """Hidden states [t, 1, h] -> logits [t, 1, experts] in float32, as the configuration demands."""
        if self.weight.dtype == torch.float32:  # Transformer Engine, which megatron-core calls, rounds float32 to TF32
            return torch.nn.functional.linear(input, self.weight)
        return super().gating(input)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **rest) -> tuple[Tensor, Tensor]:
        """logits [t, 1, experts] -> probabilities and choices [t, experts].

        Args:
            padding_mask: bool [t, 1], True for padding.
        """
        probabilities, chosen = super().routing(logits, **rest)
        if not self.training:
            return probabilities, chosen
        if not torch.is_grad_enabled():  # the first pass of activation recomputation
            self.to_recompute.append(self.loss_weight)
            return probabilities, chosen
        weight = self.to_recompute.popleft() if self.to_recompute else self.loss_weight
        real = torch.ones_like(chosen[:, :1]) if padding_mask is None else ~padding_mask.reshape(-1, 1)
        load = (chosen & real).sum(dim=0)
        self.load += load
        if self.config.moe_aux_loss_coeff:
            loss = self._imbalance(logits.view(-1, self.num_experts), load, real)
            scale = self.config.moe_aux_loss_coeff * weight / self.config.num_layers
            probabilities = MoEAuxLossAutoScaler.apply(probabilities, loss * scale)  # adds its gradient
        return probabilities, chosen

    def _imbalance(self, logits: Tensor, load: Tensor, real: Tensor) -> Tensor:
        """This rank's summand of experts * sum over experts of (tokens per token) * (mean probability).

        https://arxiv.org/abs/2101.03961, equations 4 to 6, over the tokens of a micro-batch: `num_experts_per_tok` if
        all experts have the same load, and as in transformers' `load_balancing_loss_func` for one layer.
        """
        load = load.float()
        torch.distributed.all_reduce(load, group=self.tp_cp_group)
        tokens = (load.sum() / self.topk).clamp(min=1)
        probabilities = (logits.softmax(dim=-1, dtype=torch.float32) * real).sum(dim=0)
        return self.num_experts * (load / tokens * probabilities / tokens).sum()

    def _apply_expert_bias(self, *_, **__) -> None:
        """No supported family has such a bias; megatron-core's method would be compiled to do nothing."""


def routers(models: Iterable[torch.nn.Module]) -> list[Router]:
    """The routers of this rank's model chunks; none in a dense model."""
    return [module for model in models for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def expert_load(models: Iterable[torch.nn.Module]) -> Tensor | None:
    """int64 [layers, experts] on the CPU: tokens of each expert on all ranks since the last call; None if dense.

    Padding is not counted. Must be called on all ranks.
    """
    own = routers(models)
    if not own:
        return None
    load = own[0].load.new_zeros(own[0].config.num_layers, own[0].num_experts)
    for router in own:
        load[router.layer_number - 1] = router.load
        router.load.zero_()
    torch.distributed.all_reduce(load)  # every token is on one rank: `check_layout` requires sequence parallelism
    return load.cpu()
