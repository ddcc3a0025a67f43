"""A running training in a notebook: a card and a picture that are rewritten, over them a button where somebody looks.

Headless, the same leaves one card, one picture and a few printed lines, however long the run.
"""

import time
from collections import deque
from pathlib import Path

from rsft_lib.display.live.kernel_events import hear_widgets, somebody_looks
from rsft_lib.display.live.live_output import Rewritten, png
from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.live.run_card import LOG_LINES, Card, duration, log_end, plot_live
from rsft_lib.display.live.stop_button import Controls
from rsft_lib.training.run_folder import how_it_ended

STARTS = "training starts"
LINES = 20  # printed at most
PACE = 120.0  # seconds back over which the pace is measured


def watch(job, widgets: bool | None = None) -> None:
    """Show how far a job has come until it ends; a button has it save and stop.

    Args:
        job: what `launch` started: `folder`, `train_iters`, `running`, `state` in words, `tail(lines)`, `stop()`, and
            `wait(poll)`, which blocks, and raises what went wrong.
        widgets: whether to show them; None for where somebody looks.
    """
    live = LiveRun(job.folder, job.train_iters, job, widgets)
    try:
        job.wait(poll=live.poll)
    finally:
        live.end()


class LiveRun:
    """Shows how far a run folder has come each time `poll` is called, and how it ended at `end`."""

    def __init__(self, run: str | Path, train_iters: int, job=None, widgets: bool | None = None):
        self.folder, self.train_iters, self.job = Path(run), train_iters, job
        self.run, self.state, self.pace = Follower(run), STARTS, deque()
        self.earlier: int | None = None  # the last step of an earlier run that this one goes on from
        self.printed, self.every, self.broken = -1, max(1, -(-train_iters // LINES)), False
        self.alarms = self.told = 0  # in all, and those that were printed
        somebody = somebody_looks() if widgets is None else widgets
        self.quiet, self.controls = somebody, Controls(train_iters) if somebody and job else None
        # With nobody there it is for whoever opens the notebook as papermill saves it meanwhile.
        self.card = Rewritten(self._card, 0.4 if somebody else 10.0)
        self.picture = Rewritten(self._picture, 5.0 if somebody else 60.0)
        self.card.refresh()

    def poll(self) -> None:
        """Show what is new. A fault in showing it is told, once: it is no reason to lose a training."""
        if self.broken:
            return
        try:
            self._listen()
            self._look()
        except Exception as error:
            self.broken = True
            print(f"the dashboard stopped ({error!r}); the training goes on", flush=True)

    def end(self) -> None:
        """Show how it ended. The widgets go, since there is nothing left to stop."""
        if self.controls:
            self.controls.close()
            self.controls = None
        self.poll()
        self.state = self._ended()
        self.card.refresh(now=True)
        if self.run.last:
            self.picture.refresh(now=True)

    def _listen(self) -> None:
        if not self.controls:
            return
        hear_widgets()
        if self.controls.asked and self.state != "stopping":
            self.state = "stopping"
            self.controls.say("saving after this step …")
            self.job.stop()

    def _look(self) -> None:
        if self.run.read():
            self._take_in(self.run.last["iteration"])
        self.earlier = self.earlier or 0
        if self.controls:
            self.controls.go_to(self.run.last.get("iteration", 0))
        self.card.refresh()
        if len(self.run.lines["loss"][0]) > 1:  # a line has two points
            self.picture.refresh()
        if self.run.last:
            self._print()

    def _take_in(self, last: int) -> None:
        """Note when a step came; between an earlier run's last and the first of this one lies its start."""
        if self.earlier is None or last <= self.earlier:
            self.earlier = last  # it may go on from before what was written
            return
        self.state = "training" if self.state == STARTS else self.state
        now = time.monotonic()
        self.pace.append((now, last))
        while now - self.pace[0][0] > PACE and len(self.pace) > 2:
            self.pace.popleft()

    def _left(self) -> float | None:
        """Seconds to the end at the pace of the last minutes, saving and evaluating included."""
        if self.state != "training":
            return None
        (began, first), (now, last) = self.pace[0], self.pace[-1]
        seconds = (now - began) / (last - first) if last > first else self.run.last["seconds"]
        return seconds * (self.train_iters - last)

    def _card(self) -> dict:
        log = log_end(self.job.tail(LOG_LINES)) if self.job else ""
        waits = f"{self.state} ({self.job.state})" if self.job and self.state == STARTS else self.state
        card = Card(
            self.run.last, self.train_iters, waits, self._left(), list(self.run.alarms), self.run.alarm_count,
            log=log, bar=self.controls is None, problem=self.run.problem,
        )  # fmt: skip
        return {"text/html": card._repr_html_(), "text/plain": repr(card)}

    def _picture(self) -> dict:
        said = f"loss by mode, and the choice of the mode, up to step {self.run.last['iteration']:,}"
        return {"image/png": png(plot_live(self.run, self.train_iters)), "text/plain": said}

    def _print(self) -> None:
        """A line now and then, for logs, in which nothing is rewritten."""
        done = self.run.last["iteration"]
        if self.quiet:
            return
        if self.run.alarm_count > self.alarms and self.told < LINES:
            self.alarms, self.told = self.run.alarm_count, self.told + 1
            print(f"ALARM: {self.run.alarms[-1]}", flush=True)
        if done // self.every > self.printed // self.every or done == self.train_iters > self.printed:
            self.printed = done
            print(line(self.run.last, self.train_iters, self._left()), flush=True)

    def _ended(self) -> str:
        if self.job and self.job.running:
            return "still running"
        how = how_it_ended(self.folder)
        if not how:
            return "failed or was killed; see the log"
        return how if how == "finished" else f"{how} and saved; run again to go on"


def line(record: dict, train_iters: int, left: float | None = None) -> str:
    """A step on one line."""
    text = f"step {record['iteration']:,}/{train_iters:,}  loss {record['loss']:.3f}  "
    text += f"{record['tokens_per_second']:,.0f} tokens/s"
    text += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    text += f"  {duration(left)} left" if left else ""
    return text
