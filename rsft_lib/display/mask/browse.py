"""The samples of a store, as a short table and with a slider; each is shown by `mask.sample`."""

import ipywidgets as widgets
import numpy as np
from IPython.display import display
from transformers import PreTrainedTokenizerBase

from rsft_lib.data.store import TokenStore
from rsft_lib.display.data.sample_stats import Samples
from rsft_lib.display.html import Table, one_line, warning
from rsft_lib.display.live.kernel_events import somebody_looks
from rsft_lib.display.mask.sample import show_sample
from rsft_lib.display.mask.token_text import TokenText

EVERY = "every mode"
SHOWN = 60  # characters shown of the beginning and the end of a text


def browse(store: TokenStore, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> None:
    """A table of samples worth a look and, if a user is present, a slider over all of them."""
    display(extremes_table(store, tokenizer, samples))
    if somebody_looks():
        display(slider(store, tokenizer, samples))


def extremes_table(store: TokenStore, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> Table:
    """The shortest, the median and the longest stored sample of each mode."""
    rows = []
    for mode in samples.present:
        numbers = np.flatnonzero(samples.of(mode))
        numbers = numbers[np.argsort(store.lengths[numbers], kind="stable")]
        places = {"longest": -1, "median": len(numbers) // 2, "shortest": 0}
        names = {int(numbers[place]): name for name, place in places.items()}  # each sample once
        for number, name in reversed(names.items()):
            text = one_line(TokenText(store[number][0], tokenizer).between(0, int(store.lengths[number])))
            ends = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} … {text[-SHOWN:]}"
            rows.append((mode, name, str(number), int(store.lengths[number]), int(samples.trained[number]), ends))
    return Table("samples worth a look", ("mode", "", "example", "tokens", "trained", "text"), rows)


def slider(store: TokenStore, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> widgets.VBox:
    """A slider over the samples of a mode and length range, and the selected sample below it."""
    longest = int(store.lengths.max())
    mode = widgets.Dropdown(options=[EVERY, *samples.present], description="mode")
    lengths = widgets.IntRangeSlider(value=(0, longest), max=longest, description="tokens", continuous_update=False)
    place = widgets.IntSlider(description="which", continuous_update=False, layout={"width": "40em"})
    back, forth = (widgets.Button(description=sign, layout={"width": "3em"}) for sign in ("◀", "▶"))
    shown, matching = widgets.HTML(), np.arange(len(store))

    def filter_samples(_=None) -> None:
        nonlocal matching
        low, high = lengths.value
        chosen = (store.lengths >= low) & (store.lengths <= high)
        matching = np.flatnonzero(chosen if mode.value == EVERY else chosen & samples.of(mode.value))
        place.max, place.value = max(0, len(matching) - 1), 0
        show()

    def show(_=None) -> None:
        try:
            sample = show_sample(store, int(matching[place.value]), tokenizer)._repr_html_() if len(matching) else ""
        except ValueError as error:
            sample = warning(str(error))
        shown.value = f"<p>{len(matching):,} of {len(store):,} samples</p>{sample}"

    def step(by: int) -> None:
        place.value = min(max(place.value + by, 0), place.max)

    back.on_click(lambda _: step(-1))
    forth.on_click(lambda _: step(1))
    place.observe(show, "value")
    for control in (mode, lengths):
        control.observe(filter_samples, "value")
    filter_samples()
    return widgets.VBox([widgets.HBox([mode, lengths]), widgets.HBox([back, place, forth]), shown])
