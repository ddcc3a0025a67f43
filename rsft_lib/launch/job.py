"""The handle of a training that runs in other processes: watch it, wait for it, ask it to stop."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from rsft_lib.checkpoint.run_checkpoints import checkpoints
from rsft_lib.common.artifact import write_json
from rsft_lib.launch.failure import failure
from rsft_lib.launch.log import read_end, without_report
from rsft_lib.training.best import best_of
from rsft_lib.training.metrics import scan_metrics
from rsft_lib.training.run_folder import JOB, LOG, STOPPING, how_it_ended, read_ended, read_record

TRAIN = "rsft_lib.training.train"
REPORTED = 2**16  # bytes of a log's end that torchrun may fill with its report of failed ranks
Types = type | tuple[type, ...]
COMMON: dict[str, Types] = {"launcher": str, "train_iters": int, "on_interrupt": str, "patience": (int, float)}
"""Fields of every job."""
FACTS: dict[str, dict[str, Types]] = {"local": {"pid": int, "birth": str, "host": str}, "slurm": {"id": str}}
"""Additional fields by launcher."""
ENVIRONMENT = {  # defaults for the ranks' environment
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # less fragmentation
    "THP_MEM_ALLOC_ENABLE": "1",  # huge pages for CPU memory: fewer page faults when saving and loading
    "NVTE_NORM_FWD_USE_CUDNN": "1", "NVTE_NORM_BWD_USE_CUDNN": "1",  # twice as fast as Transformer Engine's own norms
    "NVTE_USE_CUTLASS_GROUPED_GEMM": "1",  # on Hopper, one kernel for all experts instead of one for each
    "UB_SKIPMC": "1",  # tensor_overlap through CUDA IPC: NVLink multicast is missing in many VMs
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no process pool per rank for a few kernels
}  # fmt: skip


class Common(TypedDict):
    """What every job is started with."""

    train_iters: int
    on_interrupt: str
    patience: float


class Job:
    """A training in its run folder. `local.LocalJob` and `slurm.SlurmJob` find and end its processes."""

    launcher = ""

    def __init__(self, folder: Path, train_iters: int, on_interrupt: str, patience: float):
        self.folder, self.log = Path(folder), Path(folder) / LOG
        self.train_iters, self.on_interrupt, self.patience = train_iters, on_interrupt, patience

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        raise NotImplementedError

    @property
    def state(self) -> str:
        """A description for people."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ask it to save and end."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it without saving."""
        raise NotImplementedError

    @property
    def ended(self) -> dict:
        """Why it ended (`reason`) and after which step (`iteration`); empty while it runs, or if it failed."""
        return read_ended(self.folder)

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return (self.folder / STOPPING).exists()

    def wait(self, poll: Callable[[], None] = lambda: None) -> None:
        """Wait until it ends, calling `poll` twice a second.

        On an interrupt, or an error in `poll`, `on_interrupt` applies: "stop" first lets the job save and end, for at
        most `patience` seconds; "leave" keeps it running.

        Raises:
            RunFailed: it failed; the message starts with the first failing rank's traceback.
            RunStopped: it was asked to stop before it had anything to save.
        """
        try:
            while self.running:
                poll()
                self._pause()
            poll()
        except BaseException:
            self._interrupted()
            raise
        if self._failed():
            raise failure(TRAIN, self.log, self.state, self.stopping and not self.ended)

    def tail(self, lines: int = 15) -> str:
        """The last lines that the ranks logged; only the end of the file is read."""
        return "\n".join(without_report(read_end(self.log, REPORTED + 400 * lines)).splitlines()[-lines:])

    def status(self) -> dict:
        """Whether it is done, for `notebook.finish`: `status` is "done", or "stopped" with a `hint` how to resume."""
        ended = self.ended
        if ended.get("reason") == "finished":
            return {"status": "done"}
        when = f"after step {ended['iteration']:,} of {self.train_iters:,}" if "iteration" in ended else ""
        how = f"{how_it_ended(self.folder)} {when}".rstrip()
        return {"status": "stopped", "hint": f"{how}; run again with the same settings to resume"}

    def outcome(self) -> dict:
        """The result, for `notebook.finish`: status, first and last losses, why it ended, last checkpoint.

        Raises:
            ValueError: it has not completed a step.
        """
        metrics = scan_metrics(self.folder)
        records = metrics.records
        if not records:
            why = "; ".join(metrics.problems) or "the training has not completed a step"
            raise ValueError(f"{self.folder} has no metrics: {why}")
        held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
        saved = checkpoints(self.folder)
        facts = {
            "first_loss": records[0]["loss"],
            "last_loss": records[-1]["loss"],
            "held_out_loss": held_out[-1] if held_out else None,
            "iteration": records[-1]["iteration"],
            "ended": how_it_ended(self.folder),
            "job": self.state,
            "checkpoint": str(saved[-1] if saved else "none"),
        }
        facts |= {"best": best} if (best := best_of(self.folder)) else {}
        facts |= {"damaged": "; ".join(metrics.problems)} if metrics.problems else {}
        return {**self.status(), **facts, "summary": "\n".join(f"{name:<15}{value}" for name, value in facts.items())}

    def remember(self, **facts) -> None:
        """Write the facts for `attach` into the run folder."""
        common = {"launcher": self.launcher, "train_iters": self.train_iters}
        common |= {"on_interrupt": self.on_interrupt, "patience": self.patience}
        write_json(self.folder / JOB, common | facts)

    def _failed(self) -> bool:
        """Whether a job that has ended failed."""
        return not self.ended

    def _pause(self) -> None:
        time.sleep(0.5)

    def _interrupted(self) -> None:
        if not self.running:
            return
        if self.on_interrupt == "leave":
            print(f"training continues ({self.state}); run this notebook again to attach to it", flush=True)
            return
        self.stop()
        deadline = time.monotonic() + self.patience + 10
        while self.running and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.running:
            self.kill()


def read_job(folder: Path) -> dict:
    """The facts that `remember` wrote; empty if nothing was started.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / JOB
    try:
        facts = read_record(path)
        expected = COMMON | FACTS.get(str(facts.get("launcher")), {"launcher": ()})
        if facts and facts.keys() != expected.keys():
            raise ValueError(f"{path} is damaged: it has the keys {', '.join(facts)}")
        if wrong := [name for name, value in facts.items() if not isinstance(value, expected[name])]:
            raise ValueError(f"{path} is damaged: {wrong[0]} is {facts[wrong[0]]!r}")
    except ValueError as error:
        raise ValueError(
            f"{error}. It records which process or job trains in this folder: check with ps or squeue that none does, "
            "remove the file, and run again"
        ) from None
    return facts
