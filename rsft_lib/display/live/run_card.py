"""Progress of a run as a card and a plot without widgets, for the live dashboard and the saved notebook."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.display.html import BLOCK, FAINT, PANEL, caption, escaped, inert, one_line, tint, warning
from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.metric_styles import CHOICES, LOSSES, MARKERS, METRICS, held_out_sets
from rsft_lib.display.plot_style import NEUTRAL, draw_smoothed, finished, plain_numbers, thinned, tidy

LOG_LINES, LOG_WIDTH = 6, 160  # shown of the end of the log
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SMOOTHING = 0.9


@dataclass(frozen=True)
class Card:
    """The state of a run; `left` is the estimated seconds to its end, None if unknown."""

    record: dict
    train_iters: int
    state: str
    left: float | None = None
    alarms: Sequence[str] = ()
    alarm_count: int = 0
    log: str = ""
    bar: bool = True
    problem: str = ""

    @property
    def done(self) -> int:
        return self.record.get("iteration", 0)

    @property
    def head(self) -> str:
        """Step, percentage, state and remaining time."""
        if not self.record:
            return self.state
        left = "" if self.left is None else f" · about {duration(self.left)} left"
        return f"step {self.done:,} of {self.train_iters:,} · {self.done / self.train_iters:.1%} · {self.state}{left}"

    def facts(self) -> dict[str, str]:
        """Labels and formatted values of the newest record."""
        shown = {
            "loss": ("loss", ".3f"), "<think>": ("loss_mode_think", ".3f"), "<short>": ("loss_mode_short", ".3f"),
            **{name: (metric, ".3f") for name, metric in held_out_sets(self.record).items()},
            "P(<think>) if think": ("p_think_when_think", ".1%"), "if short": ("p_think_when_short", ".1%"),
            "tokens/s": ("tokens_per_second", ",.0f"), "MFU": ("mfu", ".1%"),
            "memory, GiB": ("memory_gib", ".1f"), "grad norm": ("grad_norm", ".2f"), "lr": ("lr", ".2e"),
            "epoch": ("epoch", ".2f"), "<think> correct": ("think_accuracy", ".1%"),
            "<short> correct": ("short_accuracy", ".1%"), "own choice correct": ("choice_accuracy", ".1%"),
            "chooses <think>": ("choice_thinks", ".1%"), "correct": ("answer_accuracy", ".1%"),
        }  # fmt: skip
        values = {name: (self.record.get(key), form) for name, (key, form) in shown.items()}
        found = {name: format(value, form) for name, (value, form) in values.items() if value is not None}
        return {name: text + self._interval(shown[name][0]) for name, text in found.items()}

    def _interval(self, metric: str) -> str:
        """The 95 % interval of a metric, if it has one."""
        low, high = (self.record.get(f"{metric}_{end}") for end in ("low", "high"))
        return "" if low is None or high is None else f" ({low:.0%} to {high:.0%})"

    def __repr__(self) -> str:
        lines = [self.head, "   ".join(f"{name} {value}" for name, value in self.facts().items())]
        return "\n".join(filter(None, [*lines, *(f"ALARM {alarm}" for alarm in self.alarms), self.problem]))

    def _repr_html_(self) -> str:
        style = "padding:0 18px 4px 0;white-space:nowrap"
        tiles = "".join(
            f"<div style='{style}'><span style='{FAINT}'>{inert(name)}</span><br><b>{inert(value)}</b></div>"
            for name, value in self.facts().items()
        )
        width = "width:100%;height:10px;margin:4px 0"
        bar = f"<progress value='{self.done}' max='{self.train_iters}' style='{width}'></progress>" if self.bar else ""
        more = self.alarm_count - len(self.alarms)
        alarms = [*([f"{more} earlier alarms"] if more > 0 else []), *self.alarms, *filter(None, [self.problem])]
        return (
            f"<div style='{PANEL}'><b>{inert(self.head)}</b>{bar}"
            f"<div style='display:flex;flex-wrap:wrap;margin-top:4px'>{tiles}</div>"
            f"{''.join(warning(alarm) for alarm in alarms)}{self._log()}</div>"
        )

    def _log(self) -> str:
        if not self.log:
            return ""
        style = f"{BLOCK};{tint(NEUTRAL)};max-height:11em;overflow:hidden"
        return f"<div style='{FAINT}'>end of the log</div><pre style='{style}'>{self.log}</pre>"


def log_end(log: str) -> str:
    """The last lines of a log as escaped HTML, limited in number and width."""
    lines = log.rstrip("\n").split("\n")[-LOG_LINES:]
    last = [ANSI.sub("", line.rstrip("\r")).rpartition("\r")[2] for line in lines]
    return "\n".join(escaped(one_line(line[:LOG_WIDTH])) for line in last)


def duration(seconds: float) -> str:
    """Seconds in human-readable form.

    >>> duration(3725)
    '1 h 02 min'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def plot_live(run: Follower, train_iters: int) -> Figure:
    """Training loss by mode, held-out loss, and the probability of the correct mode, so far.

    Only the loss if no answer so far begins with a control token.
    """
    modes = not run.lines["loss"][0] or any(run.lines[name][0] for name in (*LOSSES, *CHOICES) if name != "loss")
    figure = plt.figure(figsize=(11, 3.4), layout="constrained")
    losses, *choices = figure.subplots(1, 1 + modes, width_ratios=(3, 2)[: 1 + modes], squeeze=False).flat
    _draw(losses, run, LOSSES, raw=True)
    for (name, metric), marker in zip(held_out_sets(run.lines).items(), cycle(MARKERS), strict=False):
        values, label = thinned(*run.lines[metric]), caption(name)
        if len(values[0]):
            losses.plot(*values, marker, color=NEUTRAL, markersize=4, label=label, clip_on=False)
    losses.set_yscale("log")
    plain_numbers(losses)
    losses.set_title("loss per trained token" + ", by mode" * modes, loc="left")
    for axes in choices:
        _draw(axes, run, CHOICES, raw=False)
        axes.set(ylim=(-0.03, 1.03))
        axes.set_title("probability of <think> vs. <short>", loc="left")
    for axes in (losses, *choices):
        axes.set(xlabel="step", xlim=(0, train_iters))
        tidy(axes)
        if axes.lines:
            axes.legend(fontsize="small", edgecolor="none")
    return finished(figure)


def _draw(axes: Axes, run: Follower, metrics: list[str], raw: bool) -> None:
    for metric in metrics:
        steps, values = run.lines[metric]
        if steps:
            _, label, color, style = METRICS[metric]
            draw_smoothed(axes, steps, values, SMOOTHING, raw, linestyle=style, color=color, label=label)
