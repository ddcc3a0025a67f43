"""The course of one run as a picture, drawn from its `metrics.jsonl`; `compare_runs` draws several."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.common.paths import existing
from rsft_lib.display.plot_style import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, plain_numbers, smoothed, thinned, tidy
from rsft_lib.display.runs.runs import Run, open_run

NOTHING = 1e-3  # nats, below which a loss is none
KINDS = {
    "loss_mode_think": ("<think>", BLUE, "-"), "loss_mode_short": ("<short>", ORANGE, "-"),
    "loss_mode_other": ("other", BLACK, "-"), "loss_span_control": ("control token", PINK, ":"),
    "loss_span_think": ("chain of thought", SKY, ":"), "loss_span_answer": ("answer", GREEN, ":"),
    "loss_span_eos": ("end", BLACK, ":"),
}  # fmt: skip
SPANS = {name: KINDS[name] for name in ("loss_span_answer", "loss_span_eos")}
CHOICES = {
    "p_think_when_think": ("where the data thinks", BLUE, "-"),
    "p_think_when_short": ("where it answers at once", ORANGE, "--"),
    "think_share": ("share of thinking in the data", BLACK, ":"),
}


def plot_curves(run: str | Path, smoothing: float = 0.9) -> Figure:
    """Loss, also by mode and span, choice of the mode, gradient norm, learning rate and speed of a run, by step.

    The raw values stay visible behind the smoothed ones; nothing is smoothed in the file.

    Args:
        smoothing: weight of the past in the running mean, from 0 (none) to below 1.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the run has not finished a step yet.
    """
    folder = existing(run, "run folder")
    opened = open_run(folder, folder.name)
    figure, axes = plt.subplots(3, 2, figsize=(11, 9.5), layout="constrained")
    places = iter(axes.flat)
    _draw_loss(next(places), opened, smoothing)
    if opened.of_one_mode:
        _draw_lines(next(places), opened, SPANS, "loss by span", smoothing)
    else:
        _draw_lines(next(places), opened, KINDS, "loss by mode (line) and by span (dots)", smoothing)
        _draw_lines(next(places), opened, CHOICES, "probability of <think> against <short>", smoothing)
    _draw(next(places), opened, "grad_norm", "gradient norm", smoothing)
    _draw(next(places), opened, "lr", "learning rate", 0)
    _draw(next(places), opened, "tokens_per_second", f"tokens per second{_mfu(opened)}", smoothing)
    for empty in places:
        empty.remove()
    for place in axes[0]:
        if place.lines:
            place.set_yscale("log")
            place.set_ylim(bottom=max(place.get_ylim()[0], NOTHING))
            plain_numbers(place)
    for place in figure.axes:
        place.set_xlabel("step")
        tidy(place)
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure


def _draw_loss(axes: Axes, run: Run, smoothing: float) -> None:
    """Training loss, the held-out loss as dots, and upright lines at alarms."""
    _draw(axes, run, "loss", "loss per trained token", smoothing)
    steps, values = run.line("eval_loss", "step")
    if len(steps):
        axes.plot(*thinned(steps, values), "o--", color=ORANGE, label="held-out", markersize=4)
    for step in run.alarms[-50:]:
        axes.axvline(step, color=PINK, linestyle=":", linewidth=1)
    axes.legend(fontsize="small", framealpha=0.85, edgecolor="none")


def _draw(axes: Axes, run: Run, metric: str, title: str, smoothing: float) -> None:
    steps, values = run.line(metric, "step")
    axes.plot(*thinned(steps, values), color=BLUE, alpha=0.3 if smoothing else 1, linewidth=1)
    if smoothing:
        axes.plot(*thinned(steps, smoothed(values, smoothing)), color=BLUE, label="train, smoothed")
    axes.set_title(title, loc="left")


def _draw_lines(axes: Axes, run: Run, lines: dict[str, tuple[str, str, str]], title: str, smoothing: float) -> None:
    """Several metrics in one picture; a step that has no token of a kind has no value of it."""
    for metric, (label, color, style) in lines.items():
        steps, values = run.line(metric, "step")
        if len(steps):
            axes.plot(*thinned(steps, smoothed(values, smoothing)), style, color=color, label=label)
    axes.set_title(title, loc="left")
    if axes.lines:
        axes.legend(fontsize="small", framealpha=0.85, edgecolor="none")
    else:
        axes.text(0.5, 0.5, "the data tells no modes", ha="center", transform=axes.transAxes)


def _mfu(run: Run) -> str:
    known = run.line("mfu", "step")[1]
    return f", MFU {known.mean():.1%} on average" if len(known) else ""
