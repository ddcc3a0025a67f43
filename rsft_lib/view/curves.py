"""The course of a run as a picture, drawn from its `metrics.jsonl`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.paths import existing
from rsft_lib.training.metrics import read_metrics
from rsft_lib.view.lines import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, smoothed

KINDS = {
    "loss_mode_think": ("<think>", BLUE, "-"), "loss_mode_short": ("<short>", ORANGE, "-"),
    "loss_mode_other": ("other", BLACK, "-"), "loss_span_control": ("control token", PINK, ":"),
    "loss_span_think": ("chain of thought", SKY, ":"), "loss_span_answer": ("answer", GREEN, ":"),
    "loss_span_eos": ("end", BLACK, ":"),
}  # fmt: skip
CHOICES = {
    "p_think_when_think": ("where the data thinks", BLUE, "-"),
    "p_think_when_short": ("where it answers at once", ORANGE, "-"),
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
    records = read_metrics(existing(run, "run folder"))
    if not records:
        raise ValueError(f"{run} has no metrics yet: train first (notebook 05_train)")
    figure, axes = plt.subplots(3, 2, figsize=(11, 9.5), layout="constrained")
    _draw(axes[0, 0], records, "loss", "loss per trained token", smoothing)
    _draw_evaluations(axes[0, 0], records)
    _mark_alarms(axes[0, 0], records)
    _draw_lines(axes[0, 1], records, KINDS, "loss by mode (line) and by span (dots)", smoothing)
    _draw_lines(axes[1, 0], records, CHOICES, "probability of <think> against <short>", smoothing)
    _draw(axes[1, 1], records, "grad_norm", "gradient norm", smoothing)
    _draw(axes[2, 0], records, "lr", "learning rate", 0)
    _draw(axes[2, 1], records, "tokens_per_second", f"tokens per second{_mfu(records)}", smoothing)
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure


def _draw(axes: Axes, records: list[dict], key: str, title: str, smoothing: float) -> None:
    steps, values = [r["iteration"] for r in records], [r[key] for r in records]
    axes.plot(steps, values, color=BLUE, alpha=0.3 if smoothing else 1, linewidth=1)
    if smoothing:
        axes.plot(steps, smoothed(values, smoothing), color=BLUE, label="train, smoothed")
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)


def _draw_lines(axes: Axes, records: list[dict], lines: dict[str, tuple], title: str, smoothing: float) -> None:
    """Several metrics in one picture; a step that has no token of a kind has no value of it."""
    for key, (label, color, style) in lines.items():
        known = [(r["iteration"], r[key]) for r in records if key in r]
        if known:
            steps, values = zip(*known, strict=True)
            axes.plot(steps, smoothed(values, smoothing), style, color=color, label=label)
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")
    else:
        axes.text(0.5, 0.5, "the data tells no modes", ha="center", transform=axes.transAxes)


def _draw_evaluations(axes: Axes, records: list[dict]) -> None:
    evaluations = [(r["iteration"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o--", color=ORANGE, label="held-out", markersize=4)
    axes.legend()


def _mark_alarms(axes: Axes, records: list[dict]) -> None:
    for record in records:
        if "alarms" in record:
            axes.axvline(record["iteration"], color=PINK, linestyle=":", linewidth=1)


def _mfu(records: list[dict]) -> str:
    known = [record["mfu"] for record in records if "mfu" in record]
    return f", MFU {sum(known) / len(known):.1%} on average" if known else ""
