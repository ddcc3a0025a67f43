"""Colours of all plots, and helpers for line plots: line styles, smoothing, downsampling, axis format.

Figures have no ground of their own, and one text colour that is legible on white and on the dark grounds of JupyterLab,
VS Code and GitHub: nothing in a PNG can follow the reader's theme.
"""

from collections.abc import Collection, Iterable

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike

# The Okabe-Ito palette, which is safe for colour-blind readers. The only place where these colours are defined.
BLUE, ORANGE, GREEN, PINK, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"
NEUTRAL = "#7a7a7a"  # in place of its black: 4.3 : 1 against white and against #111111
GREY = "#999999"
plt.rcParams.update({
    "axes.facecolor": "none", "legend.facecolor": "none", "text.color": NEUTRAL,
    "axes.labelcolor": NEUTRAL, "axes.edgecolor": NEUTRAL, "xtick.color": NEUTRAL, "ytick.color": NEUTRAL,
    "grid.color": NEUTRAL, "legend.edgecolor": NEUTRAL,
})  # fmt: skip
COLORS, DASHES = (BLUE, ORANGE, GREEN, PINK, SKY, NEUTRAL), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MAX_POINTS = 1000  # per line


def finished(figure: Figure) -> Figure:
    """The figure without its ground, and closed, since a notebook would show it twice."""
    figure.patch.set_visible(False)
    plt.close(figure)
    return figure


def line_style(number: int) -> dict:
    """Colour and dash pattern of line `number`; unique for the first thirty, neighbours differ in both."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)]}


def smoothed(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving average with Adam's bias correction."""
    mean, result = 0.0, []
    for step, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**step))
    return result


def thinned(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Downsample a line to MAX_POINTS: the minimum and maximum of each segment, so that no spike is lost."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) <= MAX_POINTS:
        return x, y
    segments = np.array_split(np.arange(len(x)), MAX_POINTS // 2)
    kept = np.array([sorted((s[y[s].argmin()], s[y[s].argmax()])) for s in segments]).ravel()
    kept[-1] = len(x) - 1  # always keep the last point
    return x[kept], y[kept]


def draw_smoothed(axes: Axes, x: ArrayLike, y: Collection[float], smoothing: float, raw: bool = True, **style) -> None:
    """Draw a line smoothed and, if `raw`, the values themselves faintly behind it; `style` is for `Axes.plot`."""
    if raw and smoothing:
        axes.plot(*thinned(x, y), color=style["color"], alpha=0.3, linewidth=0.8)
    axes.plot(*thinned(x, smoothed(y, smoothing)), **style)


def plain_numbers(axes: Axes) -> None:
    """Label a logarithmic y axis with plain numbers (0.2, 0.5, 1), or linearly over less than a decade.

    Call it after the limits are set.
    """
    low, high = axes.get_ylim()
    sparse = LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,), numticks=12)
    axes.yaxis.set_major_locator(sparse if high / low > 10 else MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """A faint grid, left and bottom spines only, and thousands separators on the x axis."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
