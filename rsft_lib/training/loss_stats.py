"""Loss statistics of the trained tokens of a batch, and the metrics computed from them.

A tally is one float64 vector that is summed over ranks and micro-batches: the weighted loss, the weights, the number of
trained tokens, loss and number of tokens of each kind (see `span_kinds`), and for each mode the summed probability of
<think> against <short> at the control token.
"""

import torch
from torch import Tensor

from rsft_lib.data.span_kinds import KINDS, MODE_NAMES, SPAN_NAMES
from rsft_lib.model.loss_head import Loss

CONTROL = SPAN_NAMES.index("control")
CHOOSING = len(MODE_NAMES) - 1  # modes with a control token; the last is "other"
SIZE = 3 + 2 * KINDS + CHOOSING


@torch.no_grad()
def tally(loss: Loss, weights: Tensor, kinds: Tensor) -> Tensor:
    """The tally of one micro-batch: float64 [SIZE].

    Args:
        loss: with the log probabilities of <think> and <short> at every target, if they are watched.
        weights: float32 [n].
        kinds: int64 [n].
    """
    total, log_probabilities = loss
    losses = -log_probabilities[:, 0].double()
    is_kind = torch.nn.functional.one_hot(kinds, KINDS).double()  # [n, KINDS]
    chosen = is_kind.new_zeros(CHOOSING)
    if log_probabilities.shape[1] > 1:
        think, short = log_probabilities[:, 1:].double().unbind(1)
        controls = is_kind[:, CONTROL :: len(SPAN_NAMES)][:, :CHOOSING]  # [n, modes]
        chosen = controls.t() @ (think - short).sigmoid()
    numbers = is_kind.sum(0)
    head = torch.stack([total.detach().double(), weights.sum(dtype=torch.float64), numbers.sum()])
    return torch.cat([head, is_kind.t() @ losses, numbers, chosen])


def weight_sum(counts: list[float]) -> float:
    """The divisor of loss and gradients: the sum of weights, or 1 if it is 0."""
    return counts[1] or 1.0


def trained_tokens(counts: list[float]) -> int:
    """The number of trained tokens in a tally."""
    return int(counts[2])


def metrics(counts: list[float], prefix: str = "", kinds: bool = True) -> dict[str, float]:
    """Names and values for `metrics.jsonl`.

    Args:
        counts: a tally, summed over all ranks.
        kinds: whether the kinds of tokens are known.

    Returns:
        loss, and if kinds are known: loss_mode_* and loss_span_* per token; p_think_when_*, the mean probability of
        <think> against <short> where the data has that mode; think_share, the share of <think> in the data. Means over
        no tokens are omitted.
    """
    losses, numbers, chosen = counts[3 : 3 + KINDS], counts[3 + KINDS : 3 + 2 * KINDS], counts[3 + 2 * KINDS :]
    values: dict[str, float | None] = {"loss": counts[0] / weight_sum(counts)}
    if kinds:
        width = len(SPAN_NAMES)
        groups = {f"loss_mode_{name}": range(i * width, (i + 1) * width) for i, name in enumerate(MODE_NAMES)}
        groups |= {f"loss_span_{name}": range(i, KINDS, width) for i, name in enumerate(SPAN_NAMES)}
        values |= {name: _mean(sum(losses[k] for k in ks), sum(numbers[k] for k in ks)) for name, ks in groups.items()}
        decisions = [numbers[mode * width + CONTROL] for mode in range(CHOOSING)]
        values |= {f"p_think_when_{MODE_NAMES[mode]}": _mean(chosen[mode], decisions[mode]) for mode in range(CHOOSING)}
        values["think_share"] = _mean(decisions[MODE_NAMES.index("think")], sum(decisions))
    return {prefix + name: value for name, value in values.items() if value is not None}


def _mean(total: float, number: float) -> float | None:
    return total / number if number else None
