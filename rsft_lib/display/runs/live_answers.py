"""Answers to held-out questions during training (`eval_generate_every`): a table of the last, and curves of all."""

from collections.abc import Iterator, Mapping

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.display.html import Table
from rsft_lib.display.metric_styles import METRICS
from rsft_lib.display.plot_style import line_style
from rsft_lib.display.runs.compare_runs import finish
from rsft_lib.display.runs.runs import MISSING, Run
from rsft_lib.generation.answer_files import NAMES

TITLE = "held-out questions"
COLUMNS = (
    "answers", "correct", "95 % interval", "well-formed", "cut off", "loops", "tokens, mean", "chose <think>",
    "chose <short>",
)  # fmt: skip
MEASURED = (
    "accuracy", "accuracy_low", "accuracy_high", "well_formed", "cut_off", "loops", "tokens", "thinks", "shorts",
)  # fmt: skip
PANELS = ["think_accuracy", "short_accuracy", "choice_accuracy", "choice_thinks"]
NONE = "no run has answered held-out questions (eval_generate_every)"


def answers_table(runs: list[Run]) -> Table:
    """The last answers of each run in each mode: accuracy with its 95 % interval, form, length, and mode chosen."""
    rows = [
        (run.name, f"{run.line('questions', 'step')[0][-1]:,.0f}", *row)
        for run in runs for row in _rows({name: run.last(name) for name in run.columns})
    ]  # fmt: skip
    title = f"{TITLE}, answered during training" if rows else NONE
    return Table(title, ("run", "step", *COLUMNS) if rows else (), rows)


def newest_table(last: dict[str, float], step: int) -> Table:
    """The same of a run whose newest metrics are `last`."""
    return Table(f"{TITLE}, answered after step {step:,}", COLUMNS, [*_rows(last)])


def plot_live_answers(runs: list[Run], by: str = "step") -> Figure:
    """Accuracy of each run in each mode, with 95 % intervals, and how often it thinks by its own choice.

    Args:
        by: x axis, a key of `runs.BY`.
    """
    of_one_mode = all(run.last("answer_tokens") is not None for run in runs)
    metrics = ["answer_accuracy"] if of_one_mode else PANELS
    size = (1, 1) if of_one_mode else (2, 2)
    figure, axes = plt.subplots(*size, figsize=(11, 3.7 * size[0]), layout="constrained", sharey=True, squeeze=False)
    for place, metric in zip(axes.flat, metrics, strict=True):
        for number, run in enumerate(runs):
            style = line_style(number)
            place.plot(*run.line(metric, by), marker="o", markersize=4, **style)
            draw_interval(place, run, metric, by, style["color"])
        place.set_ylim(-0.03, 1.03)
    finish(figure, {place: METRICS[metric].title for place, metric in zip(axes.flat, metrics, strict=True)}, runs, by)
    return figure


def draw_interval(axes: Axes, run: Run, metric: str, by: str, color: str) -> None:
    """The 95 % interval of a metric as a band, where the run has recorded one."""
    (x, low), (_, high) = (run.line(f"{metric}_{end}", by) for end in ("low", "high"))
    axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)


def _rows(last: Mapping[str, float | None]) -> Iterator[tuple]:
    """A row for each mode of which the metrics are known."""
    for name in NAMES:
        value = {metric: last.get(f"{name}_{metric}") for metric in MEASURED}
        if value["tokens"] is None:
            continue
        low, high = value["accuracy_low"], value["accuracy_high"]
        yield (
            METRICS[f"{name}_tokens"].name, _share(value["accuracy"]),
            MISSING if low is None or high is None else f"{low:.0%} to {high:.0%}", _share(value["well_formed"]),
            f"{value['cut_off'] or 0:,.0f}", _share(value["loops"]), f"{value['tokens']:,.1f}",
            _share(value["thinks"]), _share(value["shorts"]),
        )  # fmt: skip


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}"
