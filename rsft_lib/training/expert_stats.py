"""Metrics of the experts' load in a step, which `model.router` counts without padding; no token is dropped."""

from torch import Tensor


def metrics(load: Tensor | None) -> dict:
    """Names and values for `metrics.jsonl`; none for a dense model.

    Args:
        load: int64 [layers, experts], the tokens of each expert in a step on all ranks, from `router.expert_load`.

    Returns:
        expert_load_max: load of the busiest expert of any layer, 1 being the mean; dead_experts: number of experts,
        over all layers, without a token in this step; expert_load: a list with the load of each expert, averaged over
        the layers.
    """
    if load is None:
        return {}
    relative = load.double() / load.double().mean(dim=1, keepdim=True).clamp(min=1)
    return {
        "expert_load_max": relative.max().item(),
        "dead_experts": int((load == 0).sum()),
        "expert_load": [round(value, 3) for value in relative.mean(dim=0).tolist()],
    }
