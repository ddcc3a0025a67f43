"""Token losses before and after a training as tables and plots: by mode and span, by sample, and suspect samples."""

import json
from collections.abc import Sequence
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
from rsft_lib.display.plot_style import NEUTRAL, finished, plain_numbers
from rsft_lib.display.stacked_bars import EDGE, LOOK
from rsft_lib.evaluation.loss_comparison import REASONS, Comparison, Suspect, hardest_spans

POINTS = 20_000  # most samples in the scatter plot, evenly spaced
RINGED, ROW = 10, 0.06  # suspects marked in it, and the height of a label as a share of the plot
LEAST = 1e-3  # nats: the smallest loss drawn on a logarithmic axis


def kinds_table(losses: Comparison) -> Table:
    """Loss per token by mode and span, and the share of each in the loss after the training."""
    tokens, before, after = losses.by_kind
    rows = []
    for kind in np.flatnonzero(tokens).tolist():
        mode, span = divmod(kind, len(SPAN_NAMES))
        rows.append((
            MODE_NAMES[mode], SPAN_NAMES[span], int(tokens[kind]), f"{before[kind] / tokens[kind]:.3f}",
            f"{after[kind] / tokens[kind]:.3f}", tokens[kind] / tokens.sum(), after[kind] / after.sum(),
        ))  # fmt: skip
    total = tokens.sum()
    rows.append(("all", "", int(total), f"{before.sum() / total:.3f}", f"{after.sum() / total:.3f}", 1.0, 1.0))
    columns = ("mode", "span", "tokens", "before", "after", "share of tokens", "share of loss after")
    return Table("loss per trained token, in nats", columns, rows)


def plot_comparison(losses: Comparison, suspects: list[Suspect]) -> Figure:
    """Loss by mode and span before and after, and a point for each sample; below the diagonal the loss fell."""
    figure, (bars, points) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _draw_kinds(bars, losses)
    draw_samples(points, losses, suspects)
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def hardest_table(losses: Comparison, tokenizer: PreTrainedTokenizerBase, count: int = 8, width: int = 4) -> Table:
    """The spans of `width` tokens with the highest loss after the training, at most one per sample."""
    rows = []
    for sample, start in hardest_spans(losses, count, width):
        part = slice(start, start + width)
        text = TokenText(losses.store[sample][0], tokenizer)
        rows.append((
            str(sample), MODE_NAMES[losses.modes[sample]], str(start), f"{losses.before[sample][part].mean():.3f}",
            f"{losses.after[sample][part].mean():.3f}", around(text, start, start + width),
        ))  # fmt: skip
    columns = ("sample", "mode", "position", "before", "after", "hardest span in ⟦ ⟧")
    return Table(f"hardest spans of {width} tokens after the training", columns, rows)


def suspects_table(
    losses: Comparison, suspects: list[Suspect], tokenizer: PreTrainedTokenizerBase, count: int = 12
) -> Table:
    """The most suspect samples, the reasons, and the token with the highest loss of each."""
    rows = []
    for sample, why in suspects[:count]:
        position, text = int(losses.worst_at[sample]), TokenText(losses.store[sample][0], tokenizer)
        rows.append((
            str(sample), ", ".join(why), MODE_NAMES[losses.modes[sample]], f"{losses.loss_before[sample]:.3f}",
            f"{losses.loss_after[sample]:.3f}", f"{losses.worst[sample]:.2f}", around(text, position, position + 1),
        ))  # fmt: skip
    counts = {why: sum(why in suspect.why for suspect in suspects) for why in REASONS}
    note = "; ".join(f"{why}: {REASONS[why]} ({count:,})" for why, count in counts.items() if count)
    columns = ("sample", "why", "mode", "before", "after", "worst token", "worst token in ⟦ ⟧")
    return Table(f"{len(suspects):,} of {len(losses):,} samples are suspect", columns, rows, note)


def write_suspects(
    losses: Comparison, suspects: list[Suspect], tokenizer: PreTrainedTokenizerBase, path: str | Path
) -> Path:
    """Write the suspects as JSON Lines, the most suspect first: sample, dataset line, reasons, losses, worst token.

    Raises:
        ValueError: the store does not record which lines its samples come from.
    """
    path, lines = resolve(path), source_lines(losses.store)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        for sample, why in suspects:
            position, text = int(losses.worst_at[sample]), TokenText(losses.store[sample][0], tokenizer)
            entry = {
                "sample": sample, "line": int(lines[sample]), "data": losses.store.manifest["data"], "why": list(why),
                "same_as": int(losses.same_as[sample]), "loss_before": round(float(losses.loss_before[sample]), 4),
                "loss_after": round(float(losses.loss_after[sample]), 4),
                "worst": round(float(losses.worst[sample]), 4), "worst_at": position,
                "around": around(text, position, position + 1),
            }  # fmt: skip
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return path


def _draw_kinds(axes: Axes, losses: Comparison) -> None:
    tokens, before, after = losses.by_kind
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


def drawn_at(losses: Comparison, samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where samples are drawn: loss before and after, float [samples, 2]."""
    return np.stack([losses.loss_before[samples], np.maximum(losses.loss_after[samples], LEAST)], axis=1)


def draw_samples(axes: Axes, losses: Comparison, suspects: list[Suspect]) -> None:
    """A point for each sample, its loss before and after, and circles around the most suspect."""
    chosen = np.unique(np.linspace(0, len(losses) - 1, min(POINTS, len(losses))).astype(int))
    for mode, marker in zip(range(len(MODE_NAMES)), "osx", strict=True):
        part = chosen[losses.modes[chosen] == mode]
        if len(part):
            color = LOOK[MODE_NAMES[mode]]["facecolor"]
            axes.scatter(
                *drawn_at(losses, part).T, s=10, alpha=0.35, marker=marker, color=color, label=MODE_NAMES[mode],
                linewidths=0,
            )  # fmt: skip
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], ":", color=NEUTRAL, linewidth=1, label="unchanged")
    axes.set(xlim=(low, high), yscale="log", xlabel="loss before", ylabel="loss after")
    plain_numbers(axes)
    _ring(axes, losses, [suspect.sample for suspect in suspects[:RINGED]])
    axes.set_title("samples, without control tokens; circles: the most suspect", loc="left", fontsize="medium")
    for handle in axes.legend(fontsize="small", markerscale=2).legend_handles:
        handle.set_alpha(1)


def _ring(axes: Axes, losses: Comparison, samples: list[int]) -> None:
    """Circles around samples, with their numbers in a column on the right, in the order of the circles."""
    points = sorted((y, x, i) for i, (x, y) in zip(samples, drawn_at(losses, samples).tolist(), strict=True))
    heights = axes.transData.transform([(x, y) for y, x, _ in points])[:, 1] if points else []
    places = axes.transAxes.inverted().transform([(0, height) for height in heights])[:, 1] if points else []
    lowest = 0.0
    for rank, ((y, x, sample), place) in enumerate(zip(points, places, strict=True)):
        lowest = max(lowest, min(float(place), 1 - ROW * (len(points) - rank)))
        axes.plot(x, y, "o", markersize=9, markerfacecolor="none", color=NEUTRAL)
        axes.annotate(
            str(sample), (x, y), xytext=(1.02, lowest), textcoords="axes fraction", va="center", fontsize="small",
            arrowprops={"arrowstyle": "-", "color": NEUTRAL, "linewidth": 0.5, "shrinkB": 5, "alpha": 0.6},
        )  # fmt: skip
        lowest += ROW
