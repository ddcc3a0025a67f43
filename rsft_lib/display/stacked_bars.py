"""Stacked horizontal bars of shares, distinguished by colour, hatch and label."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from rsft_lib.display.plot_style import BLUE, GREEN, NEUTRAL, ORANGE, SKY

# The hatches distinguish the parts in greyscale.
LOOK = {
    "think": {"facecolor": BLUE, "hatch": ""},
    "short": {"facecolor": ORANGE, "hatch": "//"},
    "other": {"facecolor": GREEN, "hatch": ".."},
    "trained": {"facecolor": SKY, "hatch": ""},
    "context": {"facecolor": "#b8b8b8", "hatch": "//"},
    "padding": {"facecolor": "none", "hatch": "xx"},
}
EDGE = {"edgecolor": NEUTRAL, "linewidth": 0.6}
WIDE, NARROW = 0.13, 0.06  # smallest shares with room for name and percentage, and for the percentage alone


def draw_bars(axes: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    """One bar from 0 to 100 % per row, the first on top; `rows` is row label -> {key of LOOK: size}."""
    for y, parts in enumerate(rows.values()):
        left, total = 0.0, sum(parts.values()) or 1
        for name, size in parts.items():
            share = size / total
            axes.barh(y, share, left=left, height=0.6, label=name if y == 0 else None, **LOOK[name], **EDGE)
            if share >= NARROW:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                label = f"{name} {share:.1%}" if share >= WIDE else f"{share:.1%}"
                axes.text(left + share / 2, y, label, ha="center", va="center", fontsize=9, bbox=box, color="#1f2328")
            left += share
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
