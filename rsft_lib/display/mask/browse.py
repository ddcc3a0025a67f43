"""A widget to browse the samples of a store; each is shown by `mask.sample`."""

import ipywidgets as widgets
import numpy as np
from transformers import PreTrainedTokenizerBase

from rsft_lib.data.store import TokenStore
from rsft_lib.display.data.sample_stats import Samples
from rsft_lib.display.html import warning
from rsft_lib.display.mask.sample import show_sample

EVERY = "every mode"


def browse(store: TokenStore, tokenizer: PreTrainedTokenizerBase, samples: Samples) -> widgets.VBox:
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
