"""Alarms of a run: loss spikes and mode collapse (the model only answers in one mode)."""

import statistics
from collections import defaultdict, deque
from functools import partial

WINDOW = 100  # number of previous steps in the statistics
FEWEST = 20  # minimum number of previous steps for an alarm
SPIKE = 6.0  # standard deviations above the mean of the window
ONE_SIDED = 0.02  # a mode with a lower probability has collapsed
BOTH = 0.1  # minimum share of a mode in the data for a collapse alarm


class Alarms:
    """Checks the metrics of every step.

    Spike: the loss of a mode (the total loss if modes are unknown) exceeds the mean of the last WINDOW steps by more
    than SPIKE standard deviations and 10 %. Losses are compared per mode, since the total loss also varies with the
    proportion of modes in a batch.
    Collapse: over the window, the model's probability of <think> or <short> is below ONE_SIDED, although its share in
    the data is at least BOTH.
    """

    def __init__(self):
        window = partial(deque, maxlen=WINDOW)
        self.losses, self.probabilities, self.shares = defaultdict(window), window(), window()

    def look(self, record: dict) -> list[str]:
        """Messages of the alarms after this step; usually none."""
        losses = {name: value for name, value in record.items() if name.startswith("loss_mode_")}
        spikes = [self._spike(name, loss) for name, loss in (losses or {"loss": record["loss"]}).items()]
        return [*filter(None, spikes), *self._collapse(record)]

    def _spike(self, name: str, loss: float) -> str:
        previous, message = self.losses[name], ""
        if len(previous) >= FEWEST:
            mean, deviation = statistics.fmean(previous), statistics.pstdev(previous)
            if loss > mean + max(SPIKE * deviation, 0.1 * mean):
                message = f"loss spike: {name} {loss:.4f} after a mean of {mean:.4f} over {len(previous)} steps"
        previous.append(loss)
        return message

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
