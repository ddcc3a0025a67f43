"""What a live training has besides its card, in front ends with widgets: a bar, and a button that ends it."""

import ipywidgets as widgets
from IPython.display import display


class Controls:
    """A row of widgets; `asked` tells whether somebody clicked."""

    def __init__(self, train_iters: int):
        self.asked = False
        self.bar = widgets.IntProgress(max=train_iters, layout={"width": "60%"})
        self.button = widgets.Button(
            description="Stop and save", icon="stop", tooltip="finish the step, write a checkpoint, and end"
        )
        self.said = widgets.Label()
        self.row = widgets.HBox([self.bar, self.button, self.said])
        self.button.on_click(self._ask)
        display(self.row)

    def _ask(self, _button) -> None:
        self.asked = True  # and no more: it may be called in another thread

    def go_to(self, step: int) -> None:
        self.bar.value = step

    def say(self, text: str) -> None:
        self.button.disabled, self.said.value = True, text

    def close(self) -> None:
        """Take the row away, so that no dead widget stays in the notebook."""
        for widget in (self.row, self.bar, self.button, self.said):
            widget.close()
