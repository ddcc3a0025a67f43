"""A stand-in for a training, for tests of the dashboard: it writes metrics and a log, and stops on request."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
from ipywidgets.widgets.widget import _instances


class Job:
    """The interface of the jobs that `launch` returns."""

    def __init__(self, folder, train_iters: int, steps: int = 1, pause: float = 0.0, log: str = "a line\n", fail=""):
        """Write `steps` steps and sleep `pause` seconds between polls; raise `fail` at the end unless it is empty."""
        self.folder, self.train_iters, self.steps, self.pause, self.fail = Path(folder), train_iters, steps, pause, fail
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log, self.running, self.stop_requests = self.folder / "train.log", True, 0
        self.state = "waits in the queue"
        self.log.write_bytes(log.encode())

    def stop(self) -> None:
        self.stop_requests += 1
        (self.folder / ".stopping").touch()

    def tail(self, lines: int) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 200_000))
            return "\n".join(file.read().decode().rstrip("\n").split("\n")[-lines:])

    def wait(self, poll) -> None:
        done, reason = 0, "finished"
        try:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                while done < self.train_iters:
                    more = range(done + 1, min(done + self.steps, self.train_iters) + 1)
                    file.write("".join(json.dumps(record(i, self.train_iters)) + "\n" for i in more))
                    file.flush()
                    done = more[-1]
                    time.sleep(self.pause)
                    poll()
                    self.write_button_id()
                    if self.stop_requests:
                        reason = "SIGTERM"
                        break
        except KeyboardInterrupt:
            (self.folder / "interrupted").touch()
            reason = "SIGINT"
        self.running = False
        (self.folder / "ended.json").write_text(json.dumps({"reason": reason, "iteration": done}))
        if self.fail:
            raise RuntimeError(self.fail)

    def write_button_id(self) -> None:
        """Write the id of the stop button, with which a front end sends a click to the kernel."""
        for widget in list(_instances.values()):
            if isinstance(widget, ipywidgets.Button) and not (self.folder / "button").exists():
                (self.folder / ".button").write_text(widget.model_id)
                (self.folder / ".button").rename(self.folder / "button")


def ended_job(folder: Path, train_iters: int, state: str = "") -> SimpleNamespace:
    """A job that has ended, without a log."""
    return SimpleNamespace(folder=folder, train_iters=train_iters, state=state, running=False, tail=lambda lines: "")


def record(step: int, steps: int) -> dict:
    """A metrics record with falling losses."""
    progress = step / steps
    think, short = 0.3 + 2 * math.exp(-8 * progress), 0.6 + 3 * math.exp(-5 * progress)
    metrics = {
        "iteration": step, "loss": 0.7 * think + 0.3 * short, "loss_mode_think": think, "loss_mode_short": short,
        "p_think_when_think": 1 - 0.5 * math.exp(-4 * progress), "p_think_when_short": 0.5 * math.exp(-4 * progress),
        "think_share": 0.5, "lr": 1e-5, "grad_norm": 1.0, "trained_tokens": 900, "tokens_per_second": 40000.0,
        "seconds": 0.5, "memory_gib": 51.25, "mfu": 0.5, "epoch": progress,
    }  # fmt: skip
    return metrics | ({"eval_loss": think + 0.1} if step % max(1, steps // 10) == 0 else {})
