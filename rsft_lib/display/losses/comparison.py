"""Token losses before and after a training as tables and pictures: by kind, by sample, and what looks wrong."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase

from rsft_lib.common.paths import resolve
from rsft_lib.common.temporary import new_file
from rsft_lib.data.exclude import source_lines
from rsft_lib.data.span_kinds import MODE_NAMES, SPAN_NAMES
from rsft_lib.display.html import Table
from rsft_lib.display.losses.token_loss_map import around
from rsft_lib.display.mask.token_text import TokenText
from rsft_lib.display.plot_style import BLACK, plain_numbers
from rsft_lib.display.stacked_bars import EDGE, LOOK
from rsft_lib.evaluation.loss_comparison import REASONS, Comparison, Suspect, hardest_spans

POINTS = 20_000  # samples in a picture, evenly picked
RINGED = 10  # suspects that are named in it
LEAST = 1e-3  # nats, below which a logarithmic axis shows no difference


def kinds_table(found: Comparison) -> Table:
    """Loss per token by mode and place in the answer, and its share in what is left to learn."""
    tokens, before, after = found.by_kind
    rows = []
    for kind in np.flatnonzero(tokens).tolist():
        mode, span = divmod(kind, len(SPAN_NAMES))
        rows.append((
            MODE_NAMES[mode], SPAN_NAMES[span], int(tokens[kind]), f"{before[kind] / tokens[kind]:.3f}",
            f"{after[kind] / tokens[kind]:.3f}", tokens[kind] / tokens.sum(), after[kind] / after.sum(),
        ))  # fmt: skip
    total = tokens.sum()
    rows.append(("all", "", int(total), f"{before.sum() / total:.3f}", f"{after.sum() / total:.3f}", 1.0, 1.0))
    columns = ("mode", "span", "tokens", "before", "after", "of the tokens", "of the loss after")
    return Table("loss per trained token, in nats", columns, rows)


def plot_comparison(found: Comparison, odd: list[Suspect]) -> Figure:
    """Loss by kind before and after, and each sample as a point: below the diagonal it was learned."""
    figure, (bars, points) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _draw_kinds(bars, found)
    _draw_samples(points, found, odd)
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure


def hardest_table(found: Comparison, tokenizer: PreTrainedTokenizerBase, count: int = 8, width: int = 4) -> Table:
    """The stretches of `width` tokens that are least likely after the training, one of a sample at most."""
    rows = []
    for sample, start in hardest_spans(found, count, width):
        part = slice(start, start + width)
        text = TokenText(found.store[sample][0], tokenizer)
        rows.append((
            str(sample), MODE_NAMES[found.modes[sample]], str(start), f"{found.before[sample][part].mean():.3f}",
            f"{found.after[sample][part].mean():.3f}", around(text, start, start + width),
        ))  # fmt: skip
    columns = ("sample", "mode", "position", "before", "after", "in ⟦ ⟧ what is hard")
    return Table(f"the hardest {width} tokens in a row, after the training", columns, rows)


def suspects_table(found: Comparison, odd: list[Suspect], tokenizer: PreTrainedTokenizerBase, count: int = 12) -> Table:
    """The oddest samples, why they are, and where their hardest token is."""
    rows = []
    for sample, why in odd[:count]:
        place, text = int(found.worst_at[sample]), TokenText(found.store[sample][0], tokenizer)
        rows.append((
            str(sample), ", ".join(why), MODE_NAMES[found.modes[sample]], f"{found.loss_before[sample]:.3f}",
            f"{found.loss_after[sample]:.3f}", f"{found.worst[sample]:.2f}", around(text, place, place + 1),
        ))  # fmt: skip
    counts = {why: sum(why in suspect.why for suspect in odd) for why in REASONS}
    note = "; ".join(f"{why}: {REASONS[why]} ({count:,})" for why, count in counts.items() if count)
    columns = ("sample", "why", "mode", "before", "after", "worst token", "in ⟦ ⟧ the worst token")
    return Table(f"{len(odd):,} of {len(found):,} samples look odd", columns, rows, note)


def write_suspects(found: Comparison, odd: list[Suspect], tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Path:
    """Write the suspects as JSON Lines, the oddest first: sample, line of the dataset, reasons, losses, worst token.

    Raises:
        ValueError: the store does not tell which records its samples were made from.
    """
    path, lines = resolve(path), source_lines(found.store)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for sample, why in odd:
            place, text = int(found.worst_at[sample]), TokenText(found.store[sample][0], tokenizer)
            entry = {
                "sample": sample, "line": int(lines[sample]), "data": found.store.manifest["data"], "why": list(why),
                "same_as": int(found.same_as[sample]), "loss_before": round(float(found.loss_before[sample]), 4),
                "loss_after": round(float(found.loss_after[sample]), 4), "worst": round(float(found.worst[sample]), 4),
                "worst_at": place, "around": around(text, place, place + 1),
            }  # fmt: skip
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return path


def _draw_kinds(axes: Axes, found: Comparison) -> None:
    tokens, before, after = found.by_kind
    kinds = np.flatnonzero(tokens).tolist()
    for y, kind in enumerate(kinds):
        for shift, sums, label, look in ((-0.2, before, "before", "context"), (0.2, after, "after", "trained")):
            loss = sums[kind] / tokens[kind]
            axes.barh(y + shift, max(loss, LEAST), 0.38, left=0, label=label if y == 0 else None, **LOOK[look], **EDGE)
            axes.text(
                max(loss, LEAST) * 1.1,
                y + shift,
                f"{loss:.3f}" if loss >= LEAST else f"< {LEAST}",
                va="center",
                fontsize="small",
            )
    names = [f"{MODE_NAMES[kind // len(SPAN_NAMES)]}: {SPAN_NAMES[kind % len(SPAN_NAMES)]}" for kind in kinds]
    axes.set_yticks(range(len(kinds)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(LEAST / 2, axes.get_xlim()[1] * 3)
    axes.set_title("loss per token, by mode and span", loc="left", fontsize="medium")
    axes.legend(frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _draw_samples(axes: Axes, found: Comparison, odd: list[Suspect]) -> None:
    chosen = np.unique(np.linspace(0, len(found) - 1, min(POINTS, len(found))).astype(int))
    for mode, marker in zip(range(len(MODE_NAMES)), "osx", strict=True):
        part = chosen[found.modes[chosen] == mode]
        if len(part):
            color = LOOK[MODE_NAMES[mode]]["facecolor"]
            axes.scatter(
                found.loss_before[part], np.maximum(found.loss_after[part], LEAST), s=10, alpha=0.35, marker=marker,
                color=color, label=MODE_NAMES[mode], linewidths=0,
            )  # fmt: skip
    for sample, _ in odd[:RINGED]:
        place = found.loss_before[sample], max(found.loss_after[sample], LEAST)
        axes.plot(*place, "o", markersize=9, markerfacecolor="none", color=BLACK)
        axes.annotate(str(sample), place, textcoords="offset points", xytext=(7, 3), fontsize="small")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], ":", color=BLACK, linewidth=1, label="as before")
    axes.set(xlim=(low, high), yscale="log", xlabel="loss before", ylabel="loss after")
    plain_numbers(axes)
    axes.set_title("samples; ringed and numbered: the oddest", loc="left", fontsize="medium")
    for handle in axes.legend(fontsize="small", markerscale=2).legend_handles:
        handle.set_alpha(1)
