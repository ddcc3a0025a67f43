"""The live dashboard of a training: a card and a plot, updated in place, and a stop button for interactive users.

A headless run leaves one card, one plot and a few printed lines, however long it is.
"""

import time
from collections import deque
from pathlib import Path

import ipywidgets
from IPython.display import display

from rsft_lib.display.html import Table
from rsft_lib.display.live.kernel_events import process_widget_events, somebody_looks
from rsft_lib.display.live.live_output import LiveOutput, png
from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.live.run_card import LOG_LINES, Card, duration, log_end, plot_live
from rsft_lib.display.model.answers import SideBySide
from rsft_lib.display.runs.live_answers import newest_table
from rsft_lib.generation.answer_files import newest_answers
from rsft_lib.training.run_folder import STOPPING, how_it_ended

STARTS = "training starts"
LINES = 20  # most lines printed
QUESTIONS, SAMPLES = "questions", 2  # the metric of steps with answers; answers shown
PACE = 120.0  # seconds over which the speed is averaged


def watch(job) -> None:
    """Show the progress of a job until it ends, with a button that saves and stops it.

    Args:
        job: as returned by `start_training`, with `folder`, `train_iters`, `running`, `state` (a string),
            `tail(lines)`, `stop()`, and `wait(poll)`, which blocks and raises the error of a failed job.
    """
    live = LiveRun(job)
    try:
        job.wait(poll=live.poll)
    finally:
        live.end()


class LiveRun:
    """Shows the progress of a job on each `poll`, and how it ended on `end`; with widgets if a user is present."""

    def __init__(self, job):
        self.job, self.train_iters = job, job.train_iters
        self.run, self.state = Follower(job.folder), STARTS
        self.pace: deque[tuple[float, int]] = deque()  # times and steps
        self.earlier: int | None = None  # last step of the run that this one resumes
        self.printed, self.every, self.broken = -1, max(1, -(-self.train_iters // LINES)), False
        self.alarms = self.printed_alarms = 0  # alarms seen, alarms printed
        self.interactive = somebody_looks()
        self.controls = Controls(self.train_iters) if self.interactive else None
        # Headless outputs are for readers of the notebook that papermill saves during the run.
        self.card = LiveOutput(self._card, 0.4 if self.interactive else 10.0)
        self.picture = LiveOutput(self._picture, 5.0 if self.interactive else 60.0)
        self.answers = LiveOutput(self._answers, 5.0 if self.interactive else 60.0)
        self.card.refresh()

    def poll(self) -> None:
        """Show new metrics. An error in the display is printed once and never stops the training."""
        if self.broken:
            return
        try:
            self._check_button()
            self._update()
        except Exception as error:
            self.broken = True
            print(f"the dashboard failed ({error!r}); the training continues", flush=True)

    def end(self) -> None:
        """Show how the run ended, and remove the widgets."""
        if self.controls:
            self.controls.close()
            self.controls = None
        self.poll()
        self.state = self._final_state()
        self.card.refresh(now=True)
        if self.run.last:
            self.picture.refresh(now=True)
        if QUESTIONS in self.run.last:
            self.answers.refresh(now=True)

    def _check_button(self) -> None:
        if not self.controls:
            return
        process_widget_events()
        if self.controls.clicked and self.state != "stopping":
            self.state = "stopping"
            self.controls.disable("saving after this step …")
            self.job.stop()

    def _update(self) -> None:
        if self.run.read():
            self._note_step(self.run.last["iteration"])
        self.earlier = self.earlier or 0
        if self.controls:
            self.controls.set_step(self.run.last.get("iteration", 0))
        self.card.refresh()
        if len(self.run.lines["loss"][0]) > 1:  # a line has two points
            self.picture.refresh()
        if QUESTIONS in self.run.last:
            self.answers.refresh()
        if self.run.last:
            self._print()

    def _note_step(self, last: int) -> None:
        """Record the time of a step, but not of steps from an earlier run: start-up is not training time."""
        if self.earlier is None or last <= self.earlier:
            self.earlier = last  # it may resume from a checkpoint before the last step written
            return
        self.state = "training" if self.state == STARTS else self.state
        now = time.monotonic()
        self.pace.append((now, last))
        while now - self.pace[0][0] > PACE and len(self.pace) > 2:
            self.pace.popleft()

    def _left(self) -> float | None:
        """Seconds to the end at the recent speed, saving and evaluation included; before that, at the last step's."""
        if self.state not in (STARTS, "training") or not self.run.last:
            return None
        (began, first), (now, last) = (self.pace[0], self.pace[-1]) if self.pace else ((0.0, 0), (0.0, 0))
        seconds = (now - began) / (last - first) if last > first else self.run.last.get("seconds")
        return None if seconds is None else seconds * (self.train_iters - self.run.last["iteration"])

    def _card(self) -> dict:
        state = f"{self.state} ({self.job.state})" if self.state == STARTS else self.state
        card = Card(
            self.run.last, self.train_iters, state, self._left(), list(self.run.alarms), self.run.alarm_count,
            log=log_end(self.job.tail(LOG_LINES)), bar=self.controls is None, problem=self.run.problem,
        )  # fmt: skip
        return {"text/html": card._repr_html_(), "text/plain": repr(card)}

    def _picture(self) -> dict:
        text = f"loss by mode and probability of the mode, up to step {self.run.last['iteration']:,}"
        return {"image/png": png(plot_live(self.run, self.train_iters)), "text/plain": text}

    def _answers(self) -> dict:
        """The scores of the newest answers to held-out questions, and the first of these answers."""
        step, asked = newest_answers(Path(self.job.folder), SAMPLES)
        shown: list[Table | SideBySide] = [newest_table(self.run.last, step), *(SideBySide(*one) for one in asked)]
        html = "".join(one._repr_html_() for one in shown)
        return {"text/html": html, "text/plain": "\n\n".join(map(repr, shown))}

    def _print(self) -> None:
        """Print a line at intervals, for logs, where outputs cannot be updated."""
        done = self.run.last["iteration"]
        if self.interactive or not done:
            return
        if self.run.alarm_count > self.alarms and self.printed_alarms < LINES:
            self.alarms, self.printed_alarms = self.run.alarm_count, self.printed_alarms + 1
            print(f"ALARM: {self.run.alarms[-1]}", flush=True)
        if done // self.every > self.printed // self.every or done == self.train_iters > self.printed:
            self.printed = done
            print(line(self.run.last, self.train_iters, self._left()), flush=True)

    def _final_state(self) -> str:
        if self.job.running:
            return "still running"
        ending = how_it_ended(self.job.folder)
        if not ending and (self.job.folder / STOPPING).exists():
            return "stopped by you before it had anything to save; run again to start"
        if not ending:
            return "failed or was killed; see the log"
        return ending if ending == "finished" else f"{ending} and saved; run again to resume"


class Controls:
    """A progress bar and a stop button, for front ends with widgets; `clicked` is True once the button was used."""

    def __init__(self, train_iters: int):
        self.clicked = False
        self.bar = ipywidgets.IntProgress(max=train_iters, layout={"width": "60%"})
        self.button = ipywidgets.Button(
            description="Stop and save", icon="stop", tooltip="finish the step, write a checkpoint, and end"
        )
        self.message = ipywidgets.Label()
        self.row = ipywidgets.HBox([self.bar, self.button, self.message])
        self.button.on_click(self._click)
        display(self.row)

    def _click(self, _button) -> None:
        self.clicked = True  # nothing else, since this may run in another thread

    def set_step(self, step: int) -> None:
        self.bar.value = step

    def disable(self, message: str) -> None:
        self.button.disabled, self.message.value = True, message

    def close(self) -> None:
        """Remove the row, so that no dead widget stays in the notebook."""
        for widget in (self.row, self.bar, self.button, self.message):
            widget.close()


def line(record: dict, train_iters: int, left: float | None = None) -> str:
    """One step as a log line."""
    text = f"step {record['iteration']:,}/{train_iters:,}  loss {record['loss']:.3f}  "
    text += f"{record['tokens_per_second']:,.0f} tokens/s"
    text += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    text += f"  {duration(left)} left" if left else ""
    return text
