"""Plots of the samples of a store: lengths, trained share, modes, and padding by batch layout."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from rsft_lib.display.data.length_costs import layouts
from rsft_lib.display.data.sample_stats import Samples
from rsft_lib.display.plot_style import NEUTRAL, finished
from rsft_lib.display.stacked_bars import EDGE, LOOK, draw_bars

BINS = 40


def plot_lengths(samples: Samples, seq_length: int) -> Figure:
    """Lengths by samples and by tokens, trained share, modes, and the content of rows of `seq_length` positions.

    Raises:
        ValueError: a sample does not fit into `seq_length`.
    """
    figure, axes = plt.subplot_mosaic(
        [["samples", "tokens"], ["share", "modes"], ["layouts", "layouts"]],
        figsize=(11, 9), height_ratios=(3, 3, 2), layout="constrained",
    )  # fmt: skip
    for name, weights in (("samples", np.ones(len(samples))), ("tokens", samples.lengths)):
        _draw_lengths(axes[name], samples, weights, name, seq_length)
    _draw_trained_share(axes["share"], samples)
    _draw_modes(axes["modes"], samples)
    _draw_layouts(axes["layouts"], samples, seq_length)
    return finished(figure)


def _draw_lengths(axes: Axes, samples: Samples, weights: np.ndarray, what: str, seq_length: int) -> None:
    lengths = samples.lengths
    _draw_histogram(axes, samples, lengths, weights, np.geomspace(lengths.min(), lengths.max() + 1, BINS + 1))
    axes.axvline(seq_length + 1, color=NEUTRAL, linestyle="--", linewidth=1)
    axes.text(seq_length + 1, 1, "seq_length", ha="center", va="bottom", transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(2, numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", rotation=45)
    median = int(np.median(lengths)) if what == "samples" else half_of_tokens(lengths)
    axes.set_title(f"sample lengths, by {what}", loc="left")
    axes.set(xlabel=f"tokens per sample; median by {what}: {median:,}", ylabel=f"share of {what}")


def half_of_tokens(lengths: np.ndarray) -> int:
    """The token-weighted median length: samples of at most this length hold half of all tokens."""
    lengths = np.sort(lengths)
    tokens = np.cumsum(lengths, dtype=np.int64)
    return int(lengths[np.searchsorted(tokens, tokens[-1] / 2)])


def _draw_trained_share(axes: Axes, samples: Samples) -> None:
    edges = np.linspace(0, 1, BINS // 2 + 1)
    _draw_histogram(axes, samples, samples.trained / samples.lengths, np.ones(len(samples)), edges)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("trained share of each sample", loc="left")
    axes.set(xlabel="trained tokens / tokens", ylabel="share of samples")


def _draw_histogram(axes: Axes, samples: Samples, values: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> None:
    """A histogram stacked by mode, as shares of the total weight."""
    below, total = np.zeros(len(edges) - 1), weights.sum(dtype=np.float64)
    for mode in samples.present:
        chosen = samples.of(mode)
        height = np.histogram(values[chosen], edges, weights=weights[chosen] / total)[0]
        axes.bar(edges[:-1], height, np.diff(edges), below, align="edge", label=mode, **LOOK[mode], **EDGE)
        below += height
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_modes(axes: Axes, samples: Samples) -> None:
    of = {mode: samples.of(mode) for mode in samples.present}
    rows = {
        "samples": {mode: int(chosen.sum()) for mode, chosen in of.items()},
        "tokens": {mode: int(samples.lengths[chosen].sum(dtype=np.int64)) for mode, chosen in of.items()},
        "in the loss": {mode: int(samples.trained[chosen].sum(dtype=np.int64)) for mode, chosen in of.items()},
    }
    draw_bars(axes, rows)
    axes.set_title("modes", loc="left")


def _draw_layouts(axes: Axes, samples: Samples, seq_length: int) -> None:
    trained = int(samples.trained.sum(dtype=np.int64))
    context = int((samples.lengths - 1).sum(dtype=np.int64)) - trained
    options = layouts(samples.lengths, seq_length)
    rows = {
        f"{layout.name}\n{layout.rows:,} rows": {
            "trained": trained, "context": context, "padding": layout.positions - trained - context,
        } for layout in options
    }  # fmt: skip
    draw_bars(axes, rows)
    filled = (trained + context) / options[0].positions
    axes.set_title(f"positions at seq_length {seq_length:,}; packs are {filled:.2%} full", loc="left")
