"""A running training in one notebook output: a line that is rewritten, and a short printed line now and then."""

import html
import sys
from pathlib import Path

from IPython.display import display

from rsft_lib.training.metrics import read_metrics


class LiveRun:
    """Shows how far a run folder has come each time `poll` is called.

    One output however long the run; beside it at most `lines` printed lines, for logs where nothing is rewritten.
    """

    def __init__(self, run: Path, train_iters: int, lines: int = 10):
        self.run, self.train_iters, self.every = Path(run), train_iters, max(1, train_iters // lines)
        self.printed = -1
        self.handle = display(self, display_id=True)

    def poll(self) -> None:
        records = read_metrics(self.run)
        if not records:
            return
        if self.handle:
            self.handle.update(self)
        if records[-1]["iteration"] // self.every > self.printed:
            self.printed = records[-1]["iteration"] // self.every
            print(self._text(records[-1]))
            sys.stdout.flush()

    def _text(self, record: dict) -> str:
        text = (
            f"step {record['iteration']}/{self.train_iters}  loss {record['loss']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        text += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        return text + "".join(f"  ALARM: {alarm}" for alarm in record.get("alarms", []))

    def __repr__(self) -> str:
        records = read_metrics(self.run)
        return self._text(records[-1]) if records else "training starts ..."

    def _repr_html_(self) -> str:
        records = read_metrics(self.run)
        done = records[-1]["iteration"] if records else 0
        bar = f"<progress value='{done}' max='{self.train_iters}' style='width:20em'></progress>"
        return f"{bar} {html.escape(repr(self))}"


def watch(job) -> None:
    """Show how far a job has come until it ends."""
    job.wait(poll=LiveRun(job.folder, job.train_iters).poll)
