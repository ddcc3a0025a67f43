"""The router of mixture-of-experts layers: megatron-core's, with a count of each expert's tokens.

Every token goes to its `num_experts_per_tok` experts, and none is dropped. Padding is routed as well, since it takes
part in the matrix products of a pack, but not counted.
"""

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Chooses the experts of every token; `load` is the number of tokens of each since it was last set to 0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("load", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None, **rest) -> tuple[Tensor, Tensor]:
        """logits [t, 1, experts] -> probabilities and choices [t, experts].

        Args:
            padding_mask: bool [t, 1], True for padding.
        """
        probabilities, chosen = super().routing(logits, **rest)
        if self.training and torch.is_grad_enabled():  # once, with activation recomputation too
            real = chosen if padding_mask is None else chosen & ~padding_mask.reshape(-1, 1)
            self.load += real.sum(dim=0)
        return probabilities, chosen

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
