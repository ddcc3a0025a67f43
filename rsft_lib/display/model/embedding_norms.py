"""The norms of control tokens' embedding rows among those of all rows."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rsft_lib.checkpoint.embedding_audit import Audit
from rsft_lib.display.html import caption
from rsft_lib.display.plot_style import BLUE, GREEN, GREY, ORANGE, finished

LINES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, ":")]


def plot_audit(audit: Audit) -> Figure:
    """A histogram of row norms for each embedding, with a vertical line for each audited token."""
    count = max(1, len(audit.norms))  # a folder without weights has none
    figure, axes = plt.subplots(1, count, figsize=(5.5 * count, 3.2), layout="constrained", squeeze=False)
    for place, (title, norms) in zip(axes[0], audit.norms.items(), strict=False):
        place.hist(norms.numpy(), bins=100, color=GREY)
        for number, row in enumerate(r for r in audit.rows if r.embedding == title):
            color, style = LINES[number % len(LINES)]
            label = caption(f"{row.token}  {row.norm:.3g}, percentile {row.percentile:.0f}")
            place.axvline(row.norm, color=color, linestyle=style, label=label)
        place.set(title=f"{title} embedding, {len(norms):,} tokens", xlabel="row norm", ylabel="tokens", yscale="log")
        if audit.rows:
            place.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return finished(figure)
