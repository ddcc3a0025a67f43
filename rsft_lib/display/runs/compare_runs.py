"""Plots that compare runs: loss, loss and choice by mode, and training health; each run has its own line style."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rsft_lib.common.paths import resolve
from rsft_lib.common.temporary import new_file
from rsft_lib.display.html import Table, caption
from rsft_lib.display.metric_styles import EXPERTS, HEALTH, MARKERS, METRICS, ONE_MODE, SIGNS, held_out_sets
from rsft_lib.display.plot_style import NEUTRAL, draw_smoothed, finished, line_style, plain_numbers, thinned, tidy
from rsft_lib.display.runs.csv_curve import LINES, Published
from rsft_lib.display.runs.runs import BY, Run

MODES = ["loss_mode_think", "loss_mode_short", "loss_span_control"]
STRENGTH = {"p_think_when_think": 1.0, "p_think_when_short": 0.45}  # metric -> opacity of its line
THEIRS: dict[str, dict] = {"loss": {}, "held_out": {"dashes": (1, 1)}}


def plot_losses(
    runs: list[Run], by: str = "step", smoothing: float = 0.9, published: Published | None = None
) -> Figure:
    """Training and held-out loss of every run, and of a published curve if given.

    Args:
        by: x axis, a key of `runs.BY`.
        smoothing: decay of the moving average of the training loss, in [0, 1); 0 for none.

    Raises:
        ValueError: `by` or `smoothing` is invalid, or the published curve lacks the columns for `by`.
    """
    _check(by, smoothing)
    figure, axes = plt.subplots(figsize=(11, 5.2), layout="constrained")
    names = [*held_out_sets(name for run in runs for name in run.columns)]
    for number, run in enumerate(runs):
        _draw(axes, run, "loss", by, smoothing, number)
        for name, metric in held_out_sets(run.columns).items():
            style = {"marker": MARKERS[names.index(name) % len(MARKERS)], "color": line_style(number)["color"]}
            axes.plot(*thinned(*run.line(metric, by)), linestyle="", markersize=4, **style)
        for x in _alarms(run, by):
            axes.plot(x, 1, "v", color=line_style(number)["color"], transform=axes.get_xaxis_transform(), clip_on=False)
    if published:
        _draw_published(axes, published, by, smoothing)
    axes.set_yscale("log")
    plain_numbers(axes)
    marks = ", ".join(f"{SIGNS[number % len(SIGNS)]} {name}" for number, name in enumerate(names)) or "no held-out data"
    title = caption(f"loss per trained token (line: smoothed; faint: raw; {marks}; ▼ alarm)")
    finish(figure, {axes: title}, runs, by)
    return figure


def plot_modes(runs: list[Run], by: str = "step", smoothing: float = 0.9) -> Figure:
    """Losses by mode and the probability of the correct mode; for data without modes, losses of answers and EOS.

    Raises:
        ValueError: as `plot_losses`.
    """
    _check(by, smoothing)
    if all(run.of_one_mode for run in runs):
        figure, axes = plt.subplots(1, len(ONE_MODE), figsize=(11, 3.9), layout="constrained")
        _draw_each(axes, ONE_MODE, runs, by, smoothing)
        finish(figure, dict(zip(axes, map(_title, ONE_MODE), strict=True)), runs, by)
        return figure
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained")
    *losses, choice = axes.flat
    _draw_each(losses, MODES, runs, by, smoothing)
    for number, run in enumerate(runs):
        for metric, strength in STRENGTH.items():
            style = {"alpha": strength, **line_style(number)}
            draw_smoothed(choice, *run.line(metric, by), smoothing, raw=False, **style)
    choice.set_ylim(-0.03, 1.03)
    title = "P(<think>) for <think> samples (strong) and <short> samples (faint)"
    finish(figure, dict(zip(axes.flat, [*map(_title, MODES), title], strict=True)), runs, by)
    return figure


def plot_health(runs: list[Run], by: str = "step", smoothing: float = 0.9) -> Figure:
    """Gradient norm, learning rate, throughput and memory; with experts, their load too.

    Raises:
        ValueError: as `plot_losses`.
    """
    _check(by, smoothing)
    panels = HEALTH + [metric for metric in EXPERTS if any(len(run.line(metric, by)[0]) for run in runs)]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(11, 3.1 * rows), layout="constrained")
    for place, metric in zip(axes.flat, panels, strict=False):
        for number, run in enumerate(runs):
            _draw(place, run, metric, by, 0 if metric in ("lr", "memory_gib") else smoothing, number)
        if metric != "grad_norm":
            place.set_ylim(bottom=0)
    for place in axes.flat[len(panels) :]:
        place.remove()
    finish(figure, dict(zip(axes.flat, map(_title, panels), strict=False)), runs, by)
    return figure


def save_figures(figures: dict[str, Figure], folder: str | Path) -> Table:
    """Write each figure as PNG and SVG, and return a table of the files."""
    folder = resolve(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, figure in figures.items():
        for kind, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            path = folder / f"{name}.{kind}"
            with new_file(path, "wb") as file:
                figure.savefig(file, format=kind, **options)
            rows.append((str(path), f"{path.stat().st_size / 1000:,.0f} kB"))
    return Table("pictures", ("file", "size"), rows)


def _title(metric: str) -> str:
    return METRICS[metric].title


def _check(by: str, smoothing: float) -> None:
    if by not in BY:
        raise ValueError(f"by is {by!r}; choose one of {', '.join(BY)}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is {smoothing}; expected a value in [0, 1)")


def _draw_each(panels: Iterable[Axes], metrics: list[str], runs: list[Run], by: str, smoothing: float) -> None:
    """One loss per panel, on a logarithmic axis."""
    for axes, metric in zip(panels, metrics, strict=True):
        for number, run in enumerate(runs):
            _draw(axes, run, metric, by, smoothing, number)
        axes.set_yscale("log")
        plain_numbers(axes)


def _draw(axes: Axes, run: Run, metric: str, by: str, smoothing: float, number: int) -> None:
    """A metric of a run, and its values on held-out data as dots; those of the loss itself have marks by their set."""
    style = line_style(number)
    draw_smoothed(axes, *run.line(metric, by), smoothing, **style)
    if metric != "loss":
        axes.plot(*thinned(*run.line(f"eval_{metric}", by)), "o", color=style["color"], markersize=4)


def _draw_published(axes: Axes, published: Published, by: str, smoothing: float) -> None:
    for what in LINES:
        style = {"color": NEUTRAL, "linewidth": 1.2, "label": caption(f"{published.name}, {LINES[what]}")}
        weight = smoothing if what == "loss" else 0
        draw_smoothed(axes, *published.line(what, by), weight, **style | THEIRS[what])
    if not any(len(published.line(what, by)[0]) for what in LINES):
        raise ValueError(
            f"{published.name} has the columns {', '.join(published.columns)}, which cannot be plotted by {by!r}"
        )


def _alarms(run: Run, by: str) -> Iterable[float]:
    return run.x(by)[np.isin(run.columns["iteration"], run.alarms)]


def finish(figure: Figure, titles: dict[Axes, str], runs: list[Run], by: str) -> None:
    """Set titles, axes, and one legend below all panels."""
    for axes, title in titles.items():
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xlabel(BY[by])
        tidy(axes)
        if not any(len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, "not recorded in these runs", ha="center", transform=axes.transAxes)
    handles = [Line2D([], [], label=caption(run.name), **line_style(number)) for number, run in enumerate(runs)]
    handles += [line for axes in titles for line in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    finished(figure)
