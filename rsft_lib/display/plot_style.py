"""Lines with many points: told apart by colour and stroke, smoothed, and thinned to what a picture can show."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Of the Okabe-Ito palette, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, PINK, SKY, BLACK = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000"
COLORS, STROKES = (BLUE, ORANGE, GREEN, PINK, SKY, BLACK), ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MOST = 1000  # points that a line of a picture has


def look(number: int) -> dict:
    """Colour and stroke of the line `number`; the first thirty differ, neighbours in both."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": STROKES[number % len(STROKES)]}


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential running mean without the pull towards zero at its beginning (Adam's bias correction)."""
    mean, result = 0.0, []
    for step, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        result.append(mean / (1 - weight**step))
    return result


def thinned(x: list[float], y: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST points of a line: of every stretch the lowest and the highest, so that no spike is lost."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) <= MOST:
        return x, y
    stretches = np.array_split(np.arange(len(x)), MOST // 2)
    kept = np.array([sorted((s[y[s].argmin()], s[y[s].argmax()])) for s in stretches]).ravel()
    kept[-1] = len(x) - 1  # where the line is now
    return x[kept], y[kept]


def plain_numbers(axes: Axes) -> None:
    """Mark a logarithmic y axis, whose limits are settled, as a loss is read: 0.2, 0.5, 1, or evenly if it is short."""
    low, high = axes.get_ylim()
    sparse = LogLocator(subs=(1, 2, 5) if high / low < 2000 else (1,), numticks=12)
    axes.yaxis.set_major_locator(sparse if high / low > 10 else MaxNLocator(6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def tidy(axes: Axes) -> None:
    """A faint grid, two spines, thousands with a comma, titles to the left."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
