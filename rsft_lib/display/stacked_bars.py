"""Shares as horizontal bars, told apart by colour, hatch and a label in each part."""

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours: every kind of colour vision tells them apart, and the hatches do in grey.
LOOK = {
    "think": {"facecolor": "#0072b2", "hatch": ""},
    "short": {"facecolor": "#d55e00", "hatch": "//"},
    "other": {"facecolor": "#009e73", "hatch": ".."},
    "trained": {"facecolor": "#56b4e9", "hatch": ""},
    "context": {"facecolor": "#d0d0d0", "hatch": "//"},
    "empty": {"facecolor": "#ffffff", "hatch": "xx"},
}
EDGE = {"edgecolor": "#404040", "linewidth": 0.6}
WIDE, NARROW = 0.13, 0.06  # shares from which on a part has room for its name and share, and for its share alone


def draw_bars(axes: Axes, rows: dict[str, dict[str, float]]) -> None:
    """A bar from 0 to 100 % for each row, the first on top; its parts are names of LOOK and their sizes."""
    for y, parts in enumerate(rows.values()):
        left, total = 0.0, sum(parts.values()) or 1
        for name, size in parts.items():
            share = size / total
            axes.barh(y, share, left=left, height=0.6, label=name if y == 0 else None, **LOOK[name], **EDGE)
            if share >= NARROW:
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
                label = f"{name} {share:.1%}" if share >= WIDE else f"{share:.1%}"
                axes.text(left + share / 2, y, label, ha="center", va="center", fontsize=9, bbox=box)
            left += share
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
