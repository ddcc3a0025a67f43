"""Alarms of a run: loss spikes, mode collapse (the model only answers in one mode), and dead experts."""

import statistics
from collections import defaultdict, deque
from functools import partial

from torch import Tensor

WINDOW = 100  # number of previous steps in the statistics
FEWEST = 20  # minimum number of previous steps for an alarm
SPIKE = 6.0  # standard deviations above the mean of the window
RECENT = 3  # steps whose mean must be so high: one step of a mode may have few tokens
LEAST = 0.1  # nats above the mean of the window
ONE_SIDED = 0.02  # a mode with a lower probability has collapsed
SHOWN = 8  # experts that an alarm names
BOTH = 0.1  # minimum share of a mode in the data for a collapse alarm


class Alarms:
    """Checks the metrics of every step.

    Spike: the loss of a mode (the total loss if modes are unknown), in the mean of RECENT steps, exceeds the mean of
    the last WINDOW steps by more than SPIKE standard deviations, 10 % and LEAST. Losses are compared per mode, since
    the total loss also varies with the proportion of modes in a batch.
    Collapse: over the window, the model's probability of <think> or <short> is below ONE_SIDED, although its share in
    the data is at least BOTH.
    Dead experts: experts that have not received a token in FEWEST steps; each is reported once.
    """

    def __init__(self):
        window = partial(deque, maxlen=WINDOW)
        self.losses, self.probabilities, self.shares = defaultdict(window), window(), window()
        self.idle: Tensor | None = None  # [layers, experts]: steps since the last token

    def look(self, record: dict, load: Tensor | None = None) -> list[str]:
        """Messages of the alarms after this step; usually none.

        Args:
            load: int64 [layers, experts], the tokens of each expert in this step; None for a dense model.
        """
        losses = {name: value for name, value in record.items() if name.startswith("loss_mode_")}
        spikes = [self._spike(name, loss) for name, loss in (losses or {"loss": record["loss"]}).items()]
        return [*filter(None, spikes), *self._collapse(record), *self._dead(load)]

    def _spike(self, name: str, loss: float) -> str:
        previous, message = self.losses[name], ""
        if len(previous) >= FEWEST:
            mean, deviation = statistics.fmean(previous), statistics.pstdev(previous)
            recent = statistics.fmean([*previous, loss][-RECENT:])
            if min(loss, recent) > mean + max(SPIKE * deviation, 0.1 * mean, LEAST):
                message = f"loss spike: {name} {loss:.4f} after a mean of {mean:.4f} over {len(previous)} steps"
        previous.append(loss)
        return message

    def _dead(self, load: Tensor | None) -> list[str]:
        if load is None:
            return []
        self.idle = (load == 0) * (1 + (0 if self.idle is None else self.idle))
        dead = [f"{expert} of layer {layer}" for layer, expert in (self.idle == FEWEST).nonzero().tolist()]
        more = f" and {len(dead) - SHOWN} others" if len(dead) > SHOWN else ""
        return [f"dead experts: no token in {FEWEST} steps for expert {', '.join(dead[:SHOWN])}{more}"] if dead else []

    def _collapse(self, record: dict) -> list[str]:
        share = record.get("think_share")
        if share is None:
            return []
        parts = [(record.get("p_think_when_think"), share), (record.get("p_think_when_short"), 1 - share)]
        self.shares.append(share)
        self.probabilities.append(sum(p * weight for p, weight in parts if p is not None))
        if len(self.shares) < FEWEST:
            return []
        data, model = statistics.fmean(self.shares), statistics.fmean(self.probabilities)
        modes = [("<think>", data, model), ("<short>", 1 - data, 1 - model)]
        return [
            f"mode collapse: the model's mean probability of {mode} is {p:.3f}, its share in the data is {in_data:.0%}"
            for mode, in_data, p in modes
            if in_data >= BOTH and p < ONE_SIDED
        ]
