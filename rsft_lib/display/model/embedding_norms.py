"""Where the rows of control tokens lie among the norms of all embedding rows."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rsft_lib.checkpoint.embedding_audit import Audit
from rsft_lib.display.html import caption

GREY, BLUE, ORANGE, GREEN = "#999999", "#0072b2", "#d55e00", "#009e73"  # of the Okabe-Ito palette
LINES = [(BLUE, "-"), (ORANGE, "--"), (GREEN, ":")]


def plot_audit(audit: Audit) -> Figure:
    """A histogram of norms for each embedding, with a line for each token that was asked for."""
    figure, axes = plt.subplots(1, len(audit.norms), figsize=(5.5 * len(audit.norms), 3.2), layout="constrained")
    for place, (title, norms) in zip([axes] if len(audit.norms) == 1 else axes, audit.norms.items(), strict=True):
        place.hist(norms.numpy(), bins=100, color=GREY)
        for number, row in enumerate(r for r in audit.rows if r.embedding == title):
            color, style = LINES[number % len(LINES)]
            label = caption(f"{row.token}  {row.norm:.3g}, above {row.percentile:.0f} %")
            place.axvline(row.norm, color=color, linestyle=style, label=label)
        place.set(
            title=f"{title} embedding, {len(norms):,} tokens", xlabel="norm of the row", ylabel="tokens", yscale="log"
        )
        place.legend()
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure
