"""A box for questions of your own, which the model answers in all modes side by side, token by token."""

import time
from pathlib import Path

import ipywidgets as widgets
from IPython.display import display

from rsft_lib.display.html import warning
from rsft_lib.display.live.kernel_events import process_widget_events, somebody_looks
from rsft_lib.display.model.answers import SideBySide
from rsft_lib.generation.answer import Answer
from rsft_lib.generation.generate import Speaker, open_speaker
from rsft_lib.generation.inference_engines import Sampling

PAUSE = 0.1  # seconds between updates


def ask_more(answered: SideBySide, model: str | Path, sampling: Sampling) -> None:
    """Show a question with its answers and, if a user is present, a box to ask the model in `model` others."""
    display(answered)
    if somebody_looks():
        display(PromptBox(answered, model, sampling).box)


class PromptBox:
    """A question, two buttons, and the answers below them; the model is loaded when the first question is asked."""

    def __init__(self, answered: SideBySide, model: str | Path, sampling: Sampling):
        self.modes, self.model, self.sampling = list(answered.answers), model, sampling
        self.speaker: Speaker | None = None
        self.stopping, self.due = False, 0.0
        self.question = widgets.Textarea(answered.question, layout={"width": "auto", "height": "5em"})
        self.ask = widgets.Button(description="Answer", icon="play", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.shown = widgets.HTML()
        self.box = widgets.VBox([self.question, widgets.HBox([self.ask, self.stop]), self.shown])
        self.ask.on_click(lambda _: self.answer())
        self.stop.on_click(lambda _: setattr(self, "stopping", True))

    def answer(self) -> None:
        """Let the model answer; an error is shown below the question."""
        self.ask.disabled, self.stop.disabled, self.stopping = True, False, False
        asked = [(self.question.value, mode) for mode in self.modes]
        try:
            self.speaker = self.speaker or open_speaker(self.model)
            self._show(self.speaker.answers(asked, self.sampling, self._seen), writing=False)
        except Exception as error:
            self.shown.value = warning(f"{type(error).__name__}: {error}")
        self.ask.disabled, self.stop.disabled = False, True

    def _seen(self, answers: list[Answer]) -> bool:
        """Show unfinished answers; returns whether to stop."""
        if time.monotonic() > self.due:
            process_widget_events()  # the click on Stop
            self._show(answers, writing=True)
            self.due = time.monotonic() + PAUSE
        return self.stopping

    def _show(self, answers: list[Answer], writing: bool) -> None:
        by_mode = dict(zip(self.modes, answers, strict=True))
        self.shown.value = SideBySide(self.question.value, by_mode, writing=writing)._repr_html_()
