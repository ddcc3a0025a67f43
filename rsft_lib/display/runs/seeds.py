"""Runs that differ in settings and seeds: the mean of a metric over the seeds of each setting, and their curves."""

import math
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.display.html import Table, caption
from rsft_lib.display.plot_style import finished, line_style, plain_numbers, smoothed, thinned, tidy
from rsft_lib.display.runs.runs import MISSING, Run

SEED, MOST_UPRIGHT = "seed", 6
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t: 97.5 % quantiles for 1 to 10 degrees of freedom; beyond, expanded in 1 / freedom to three digits."""


class Outcome(NamedTuple):
    """A run's values of what is varied, the metric that it ended with, and its curves; None if it trained nothing."""

    values: dict[str, Any]
    metric: float
    run: Run | None


class Setting(NamedTuple):
    """The runs that differ in their seeds only, and the values in which they differ from the others."""

    values: dict[str, Any]
    runs: list[Outcome]

    @property
    def label(self) -> str:
        return ", ".join(f"{name} {shown(value)}" for name, value in self.values.items()) or "all"

    @property
    def mean(self) -> float:
        return mean(one.metric for one in self.runs)

    @property
    def margin(self) -> float:
        """Half the 95 % confidence interval of the mean, of Student's t distribution; NaN for a single run."""
        return margin([one.metric for one in self.runs])


def margin(values: list[float]) -> float:
    """Half the width of the 95 % confidence interval of a mean.

    >>> round(margin([1.0, 2.0, 3.0]), 3)
    2.484
    """
    if len(values) < 2:
        return math.nan
    freedom = len(values) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else 1.960 + 2.372 / freedom + 2.823 / freedom**2
    return quantile * stdev(values) / math.sqrt(len(values))


def settings_of(outcomes: list[Outcome]) -> list[Setting]:
    """The outcomes grouped by what they differ in, seeds aside, in the order in which they come."""
    names = [name for name in (outcomes[0].values if outcomes else ()) if name.rpartition(".")[2] != SEED]
    names = [name for name in names if len({str(one.values[name]) for one in outcomes}) > 1]
    groups: dict[str, Setting] = {}
    for one in outcomes:
        values = {name: one.values[name] for name in names}
        groups.setdefault(str(values), Setting(values, [])).runs.append(one)
    return [*groups.values()]


def means_table(outcomes: list[Outcome], metric: str) -> Table:
    """The mean of the metric of each setting, its 95 % confidence interval, and the values of the runs."""
    settings = settings_of(outcomes)
    names = list(settings[0].values) if settings else []
    rows = [
        (*(shown(one.values[name]) for name in names), str(len(one.runs)), f"{one.mean:#.4g}",
         MISSING if math.isnan(one.margin) else f"{one.mean - one.margin:#.4g} to {one.mean + one.margin:#.4g}",
         "  ".join(f"{run.metric:#.4g}" for run in one.runs))
        for one in settings
    ]  # fmt: skip
    note = "" if any(len(one.runs) > 1 for one in settings) else "a single run has no interval: vary seed as well"
    columns = (*names, "runs", f"mean {metric}", "95 % interval of the mean", "each run")
    return Table(f"{metric}, by setting", columns, rows, note)


def plot_settings(outcomes: list[Outcome], metric: str, smoothing: float = 0.9) -> Figure:
    """The metric of each setting, with its interval and each run as a dot; and the training loss of all runs.

    Args:
        smoothing: decay of the moving average of the loss, in [0, 1).
    """
    settings = settings_of(outcomes)
    curves = any(one.run for one in outcomes)
    figure, axes = plt.subplots(1, 1 + curves, figsize=(11, 4.6), layout="constrained", squeeze=False)
    _draw_means(axes[0, 0], settings, metric)
    if curves:
        _draw_curves(axes[0, 1], settings, smoothing)
    for place in axes.flat:
        place.grid(alpha=0.3)
        place.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def _draw_means(axes: Axes, settings: list[Setting], metric: str) -> None:
    for number, one in enumerate(settings):
        color = line_style(number)["color"]
        axes.errorbar(number, one.mean, 0 if math.isnan(one.margin) else one.margin, fmt="_", color=color, capsize=6,
                      markersize=18)  # fmt: skip
        values = [run.metric for run in one.runs]
        axes.plot(number + np.linspace(-0.1, 0.1, len(values)), values, "o", color=color, alpha=0.5, markersize=5)
    axes.set_xticks(range(len(settings)), [caption(one.label.replace(", ", "\n")) for one in settings])
    axes.tick_params(axis="x", labelrotation=30 if len(settings) > MOST_UPRIGHT else 0)
    axes.set_xlim(-0.5, max(1, len(settings)) - 0.5)
    axes.set_title(caption(f"{metric}: mean with 95 % interval, and each run"), loc="left", fontsize="medium")


def _draw_curves(axes: Axes, settings: list[Setting], smoothing: float) -> None:
    for number, setting in enumerate(settings):
        runs = [one.run for one in setting.runs if one.run]
        for count, run in enumerate(runs):
            x, values = run.line("loss", "step")
            label = {"label": caption(setting.label)} if not count else {}
            axes.plot(*thinned(x, smoothed(values, smoothing)), **line_style(number), **label, linewidth=1.3)
            axes.plot(*thinned(*run.line("eval_loss", "step")), "o", color=line_style(number)["color"], markersize=4)
    axes.set_yscale("log")
    plain_numbers(axes)
    tidy(axes)
    axes.set_xlabel("step")
    axes.set_title("loss per trained token (line: smoothed; dots: held-out)", loc="left", fontsize="medium")
    axes.legend(fontsize="small", edgecolor="none")


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
