"""The loss map of a sample, and a scatter plot of the samples with a button on each point, which shows its map."""

from io import BytesIO

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from transformers import PreTrainedTokenizerBase

from rsft_lib.display.live.kernel_events import somebody_looks
from rsft_lib.display.losses.comparison import draw_samples, drawn_at
from rsft_lib.display.losses.token_loss_map import show_losses
from rsft_lib.display.plot_style import finished
from rsft_lib.evaluation.loss_comparison import Comparison, Suspect

CLICKABLE = 300  # most samples with a button: suspects, then evenly spaced ones
DPI, WIDTH, HEIGHT, SIZE = 96, 720, 440, 12  # of the plot, in pixels; width and height of a button
STACKED = {"grid_area": "1 / 1 / 2 / 2"}  # all in one cell of a grid


def browse(losses: Comparison, number: int, tokenizer: PreTrainedTokenizerBase, suspects: list[Suspect]) -> None:
    """The loss map of sample `number`, -1 for the most suspect, and plot and maps of others if a user is present.

    Raises:
        ValueError: there is no such sample.
    """
    display(show_losses(losses, number, tokenizer, suspects))
    if somebody_looks():
        display(clickable_plot(losses, tokenizer, suspects))


def clickable_plot(losses: Comparison, tokenizer: PreTrainedTokenizerBase, suspects: list[Suspect]) -> widgets.VBox:
    """The loss of each sample before and after; a click on a point shows its map below."""
    figure, axes = plt.subplots(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, layout="constrained")
    draw_samples(axes, losses, suspects)
    axes.spines[["top", "right"]].set_visible(False)
    file, shown = BytesIO(), widgets.HTML("click on a point to see its sample")
    finished(figure).savefig(file, dpi=DPI)  # arranges the axes, too

    def show(number: int) -> None:
        shown.value = show_losses(losses, number, tokenizer, suspects)._repr_html_()

    picture = widgets.Image(value=file.getvalue(), layout={**STACKED, "width": f"{WIDTH}px", "max_width": "none"})
    numbers = _clickable(losses, suspects)
    buttons = _buttons(axes, losses, numbers)
    for number, button in zip(numbers, buttons, strict=True):
        button.on_click(lambda _, number=number: show(number))
    return widgets.VBox([widgets.GridBox([picture, *buttons], layout={"align_items": "flex-start"}), shown])


def _clickable(losses: Comparison, suspects: list[Suspect]) -> list[int]:
    """Numbers of the samples with a button; the most suspect last, so that its button is on top."""
    odd = [suspect.sample for suspect in suspects[:CLICKABLE]]
    others = np.linspace(0, len(losses) - 1, min(len(losses), CLICKABLE - len(odd))).astype(int).tolist()
    return [*(number for number in dict.fromkeys(others) if number not in odd), *reversed(odd)]


def _buttons(axes: Axes, losses: Comparison, numbers: list[int]) -> list[widgets.Button]:
    """An invisible button over the point of each sample."""
    style = widgets.ButtonStyle(button_color="transparent")
    buttons = []
    for number, (x, y) in zip(numbers, axes.transData.transform(drawn_at(losses, numbers)), strict=True):
        margin = f"{HEIGHT - y - SIZE / 2:.0f}px 0 0 {x - SIZE / 2:.0f}px"
        place = {**STACKED, "margin": margin, "width": f"{SIZE}px", "height": f"{SIZE}px", "padding": "0"}
        buttons.append(widgets.Button(tooltip=f"sample {number}", layout=place, style=style))
    return buttons
