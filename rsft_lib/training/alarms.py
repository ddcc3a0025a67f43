"""What should make someone look at a run: a loss that jumps, a model that answers in one mode only."""

import statistics
from collections import defaultdict, deque
from functools import partial

WINDOW = 100  # steps that are looked back upon
FEWEST = 20  # steps before anything is said
SPIKE = 6.0  # standard deviations above the mean of the window
ONE_SIDED = 0.02  # probability of a mode below which it counts as gone
BOTH = 0.1  # share of a mode in the data from which on it should not go


class Alarms:
    """Watches the metrics of one step after the other.

    Spike: the loss of a mode, or of everything where no modes are known, is more than SPIKE standard deviations above
    the mean of the last WINDOW steps (and 10 % of it). Per mode, since a step that happens to hold short answers only
    has another loss than the steps before, which is no news.
    Collapse: over the window the model gives <think> a probability under ONE_SIDED, or <short>, although the data has
    at least BOTH of it.
    """

    def __init__(self):
        window = partial(deque, maxlen=WINDOW)
        self.losses, self.probabilities, self.shares = defaultdict(window), window(), window()

    def look(self, record: dict) -> list[str]:
        """What is wrong after this step; usually nothing."""
        losses = {name: value for name, value in record.items() if name.startswith("loss_mode_")}
        found = [self._spike(name, loss) for name, loss in (losses or {"loss": record["loss"]}).items()]
        return [*filter(None, found), *self._collapse(record)]

    def _spike(self, name: str, loss: float) -> str:
        before, found = self.losses[name], ""
        if len(before) >= FEWEST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if loss > mean + max(SPIKE * deviation, 0.1 * mean):
                found = f"loss spike: {name} {loss:.4f} after a mean of {mean:.4f} over {len(before)} steps"
        before.append(loss)
        return found

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
        gone = [("<think>", data, model), ("<short>", 1 - data, 1 - model)]
        return [
            f"mode collapse: the model gives {mode} a probability of {p:.3f}, the data has it in {there:.0%} of answers"
            for mode, there, p in gone
            if there >= BOTH and p < ONE_SIDED
        ]
