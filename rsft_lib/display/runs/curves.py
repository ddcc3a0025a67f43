"""One run: its curves as a figure, and a text summary, from `metrics.jsonl`; `compare_runs` plots several runs."""

from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.common.paths import require_path
from rsft_lib.display.html import caption
from rsft_lib.display.metric_styles import (
    ANSWERS,
    BY_MODE,
    BY_SPAN,
    CHOICES,
    MARKERS,
    METRICS,
    ONE_MODE,
    TOKENS,
    held_out_sets,
)
from rsft_lib.display.plot_style import BLUE, ORANGE, PINK, draw_smoothed, finished, plain_numbers, thinned, tidy
from rsft_lib.display.runs.live_answers import draw_interval
from rsft_lib.display.runs.runs import Run, open_run
from rsft_lib.tokenizer.dialect import MODES
from rsft_lib.training.metrics import read_metrics

LEAST = 1e-3  # nats: lower limit of the loss axes


def plot_curves(run: str | Path, smoothing: float = 0.9) -> Figure:
    """Loss, loss by mode and span, choice of the mode, gradient norm, learning rate and throughput of a run, by step.

    Raw values are drawn faintly behind the smoothed ones.

    Args:
        smoothing: decay of the moving average, in [0, 1); 0 for none.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the run has not finished a step yet.
    """
    folder = require_path(run, "run folder")
    opened = open_run(folder, folder.name)
    answered = any(len(opened.line(name, "step")[0]) for name in ANSWERS)
    figure, axes = plt.subplots(3 + answered, 2, figsize=(11, 9.5 + 3.2 * answered), layout="constrained")
    places = iter(axes.flat)
    _draw_loss(next(places), opened, smoothing)
    if opened.of_one_mode:
        _draw_lines(next(places), opened, ONE_MODE, "loss by span", smoothing)
    else:
        _draw_lines(next(places), opened, BY_MODE + BY_SPAN, "loss by mode (lines) and span (dots)", smoothing)
        # Qwen3's dialect has such a token only if the tokenizer has one for two line breaks (`dialect.choice_of`).
        none = "no single token chooses the mode"
        _draw_lines(next(places), opened, CHOICES, "probability of <think> vs. <short>", smoothing, none)
    _draw(next(places), opened, "grad_norm", smoothing)
    _draw(next(places), opened, "lr", 0)
    _draw(next(places), opened, "tokens_per_second", smoothing, note=_mfu(opened))
    if answered:
        axes_of_answers = next(places)
        _draw_lines(axes_of_answers, opened, ANSWERS, "held-out questions: correct answers, 95 % intervals", 0)
        for metric in ANSWERS:
            draw_interval(axes_of_answers, opened, metric, "step", METRICS[metric].color)
        if not opened.of_one_mode:  # a free place
            _draw_lines(next(places), opened, TOKENS, "held-out questions: tokens per answer, mean", 0)
    for empty in places:
        empty.remove()
    for place in axes[0]:
        if place.lines:
            place.set_yscale("log")
            place.set_ylim(bottom=max(place.get_ylim()[0], LEAST))
            plain_numbers(place)
    for place in figure.axes:
        place.set_xlabel("step")
        tidy(place)
    return finished(figure)


def summary(run: Path, scores: dict[str, dict[str, float]], model: Path) -> str:
    """Loss, throughput and time of a run folder, scores by mode (from `generate.score`), and the model's path."""
    records = read_metrics(run)
    seconds = sum(record["seconds"] for record in records)
    speed = sum(record["seconds"] * record["tokens_per_second"] for record in records) / seconds
    lines = [
        f"loss             {records[0]['loss']:.3f} at the first step, {records[-1]['loss']:.3f} at the last",
        f"training         {len(records)} steps, {seconds:,.0f} seconds, {speed:,.0f} tokens/s",
        *_choice(records[-1]),
        "mode             accuracy   well-formed   tokens",
    ]
    for mode, s in scores.items():
        lines.append(
            f"  {f'<{mode}>' if mode in MODES else mode}".ljust(17)
            + f"{s['accuracy']:>8.1%}   {s['well_formed']:>11.1%}   {s['tokens']:>6.1f}"
        )
    return "\n".join([*lines, f"exported model   {model}"])


def _choice(record: dict) -> list[str]:
    """The last probabilities of <think>, if the data has both modes."""
    names = ("p_think_when_think", "p_think_when_short")
    if not all(name in record for name in names):
        return []
    think, short = (record[name] for name in names)
    return [f"P(<think>)       {think:.1%} for <think> samples, {short:.1%} for <short> samples, at the last step"]


def _draw_loss(axes: Axes, run: Run, smoothing: float) -> None:
    """Training loss, held-out losses as marks, and a vertical line for each of the last alarms."""
    _draw(axes, run, "loss", smoothing)
    for (name, metric), marker in zip(held_out_sets(run.columns).items(), cycle(MARKERS), strict=False):
        values = thinned(*run.line(metric, "step"))
        axes.plot(*values, f"{marker}--", color=ORANGE, label=caption(name), markersize=4)
    for step in run.alarms[-50:]:
        axes.axvline(step, color=PINK, linestyle=":", linewidth=1)
    axes.legend(fontsize="small", edgecolor="none")


def _draw(axes: Axes, run: Run, metric: str, smoothing: float, note: str = "") -> None:
    label = "train" + ", smoothed" * bool(smoothing)
    draw_smoothed(axes, *run.line(metric, "step"), smoothing, color=BLUE, label=label)
    axes.set_title(METRICS[metric].title + note, loc="left")


def _draw_lines(
    axes: Axes, run: Run, metrics: list[str], title: str, smoothing: float, none: str = "the data has no modes"
) -> None:
    """Several metrics in one panel; a step without tokens of a kind has no value for it. `none`: text without any."""
    for metric in metrics:
        steps, values = run.line(metric, "step")
        if len(steps):
            _, label, color, style = METRICS[metric]
            draw_smoothed(axes, steps, values, smoothing, raw=False, linestyle=style, color=color, label=label)
    axes.set_title(title, loc="left")
    if axes.lines:
        place = {"loc": "upper right", "ncols": 2} if len(axes.lines) > 4 else {}
        axes.legend(fontsize="small", edgecolor="none", **place)
    else:
        axes.text(0.5, 0.5, none, ha="center", transform=axes.transAxes)


def _mfu(run: Run) -> str:
    known = run.line("mfu", "step")[1]
    return f", MFU {known.mean():.1%} on average" if len(known) else ""
