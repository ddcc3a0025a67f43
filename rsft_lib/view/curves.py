"""The course of a run as a picture, drawn from its `metrics.jsonl`."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rsft_lib.paths import existing
from rsft_lib.training.metrics import read_metrics

BLUE, ORANGE = "#0072b2", "#d55e00"  # of the Okabe-Ito palette, told apart by every kind of colour vision


def plot_curves(run: str | Path, smoothing: float = 0.9) -> Figure:
    """Loss, learning rate, gradient norm and speed of a run folder, by step.

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
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
    _draw(axes[0, 0], records, "loss", "loss per trained token", smoothing)
    _draw_evaluations(axes[0, 0], records)
    _draw(axes[0, 1], records, "grad_norm", "gradient norm", smoothing)
    _draw(axes[1, 0], records, "lr", "learning rate", 0)
    _draw(axes[1, 1], records, "tokens_per_second", "tokens per second", smoothing)
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential running mean without the pull towards zero at its beginning (Adam's bias correction)."""
    mean, result = 0.0, []
    for step, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**step))
    return result


def _draw(axes, records: list[dict], key: str, title: str, smoothing: float) -> None:
    steps, values = [r["iteration"] for r in records], [r[key] for r in records]
    axes.plot(steps, values, color=BLUE, alpha=0.3 if smoothing else 1, linewidth=1)
    if smoothing:
        axes.plot(steps, smoothed(values, smoothing), color=BLUE, label="train, smoothed")
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)


def _draw_evaluations(axes, records: list[dict]) -> None:
    evaluations = [(r["iteration"], r["eval_loss"]) for r in records if "eval_loss" in r]
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o--", color=ORANGE, label="held-out", markersize=4)
    axes.legend()
