"""The file `metrics.jsonl`, one JSON object per step, written and read; TensorBoard and Weights & Biases.

`loss_stats.metrics` computes what is in it. A new run begins it with the evaluation before its first step: a record
with iteration 0 and no training loss.

A line may be damaged by a power loss or a full disk. Readers skip and report it.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple, Protocol

from rsft_lib.common.paths import require_path
from rsft_lib.common.temporary import new_file
from rsft_lib.training.config import TrainConfig

FILE = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"  # copy of a damaged file, from before the damaged lines were removed
TENSORBOARD = "tensorboard"


class Writer(Protocol):
    """Takes the record of each step."""

    def write(self, *, iteration: int, **record) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends records; each is synced to disk."""

    def __init__(self, folder: Path, iteration: int):
        """Open the file to continue after `iteration`; records of later steps, whose results were lost, are removed.

        Damaged lines and missing steps are printed; a damaged file is copied before it is replaced.
        """
        path, previous = folder / FILE, scan_metrics(folder)
        kept = [record for record in previous.records if record["iteration"] <= iteration]
        kept = [previous.start, *kept] if previous.start and iteration else kept
        for problem in [*previous.damaged, *_gaps([record["iteration"] for record in kept], iteration)]:
            print(f"{path}: {problem}", flush=True)
        if previous.damaged:
            _keep(path)
        with new_file(path) as file:
            file.writelines(map(_line, kept))
        self.file = path.open("a", encoding="utf-8")

    def write(self, **record) -> None:
        self.file.write(_line(record))
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Writes the records as TensorBoard scalars; steps that were lost are purged."""

    def __init__(self, folder: Path, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=iteration + 1 if iteration else 0)

    def write(self, iteration: int, **record) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Logs the records to Weights & Biases; the run's id is kept in the run folder and reused when it resumes."""

    def __init__(self, folder: Path, iteration: int, config: TrainConfig):
        import wandb

        id_file = folder / "wandb_id.txt"
        self.run = wandb.init(
            project=config.wandb_project, config=config.to_json(), dir=str(folder), name=folder.name,
            id=id_file.read_text(encoding="utf-8") if id_file.exists() else None, resume="allow",
        )  # fmt: skip
        id_file.write_text(self.run.id, encoding="utf-8")

    def write(self, iteration: int, **record) -> None:
        self.run.log({name: value for name, value in record.items() if value is not None}, step=iteration)

    def close(self) -> None:
        self.run.finish()


def open_writers(folder: Path, iteration: int, config: TrainConfig) -> list[Writer]:
    """The writers of the settings, opened to continue after `iteration`."""
    writers: list[Writer] = [MetricsWriter(folder, iteration)]
    if config.tensorboard:
        writers.append(TensorBoard(folder, iteration))
    if config.wandb_project:
        writers.append(Wandb(folder, iteration, config))
    return writers


class Metrics(NamedTuple):
    """The contents of a run folder's `metrics.jsonl`."""

    records: list[dict]
    """Readable records of training steps, in order."""
    damaged: list[str]
    """A message for each damaged line."""
    gaps: list[str]
    """A message for each range of missing steps up to the last record."""
    start: dict
    """The record of the evaluation before the first step; empty without one."""

    @property
    def problems(self) -> list[str]:
        """All messages, with the file's name."""
        return [f"{FILE}: {problem}" for problem in (*self.damaged, *self.gaps)]


def scan_metrics(folder: Path) -> Metrics:
    """The records of a run folder, and their problems; there are none before the first step.

    An incomplete last line, which is still being written, is ignored.
    """
    path = Path(folder) / FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record, problem = parse(line)
        records += [record] if record else []
        damaged += [f"line {number} is damaged ({problem})"] if problem else []
    start = next((record for record in records if record["iteration"] == 0), {})
    records = [record for record in records if record["iteration"]]
    steps = [record["iteration"] for record in records]
    return Metrics(records, damaged, _gaps(steps, max(steps, default=0)), start)


def read_metrics(folder: str | Path) -> list[dict]:
    """The readable records of a run folder's training steps, in order; `scan_metrics` has the one before them, too.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    return scan_metrics(require_path(folder, "run folder")).records


def parse(line: bytes) -> tuple[dict | None, str]:
    """(record, problem) of a line; a damaged line may still end in a complete record."""
    try:
        return _record(line), ""
    except (ValueError, RecursionError) as error:
        begin = line.rfind(b'{"iteration"')
        return (parse(line[begin:])[0] if begin > 0 else None), str(error)


def _keep(path: Path) -> None:
    """Copy a damaged file to an unused name; the original stays, so that a kill at any time loses nothing."""
    others = (f"metrics.damaged-{number}.jsonl" for number in itertools.count(2))
    names = map(path.with_name, itertools.chain([DAMAGED], others))
    with new_file(next(name for name in names if not name.exists()), "wb") as file:
        file.write(path.read_bytes())


def _record(line: bytes) -> dict:
    if b"\0" in line:
        raise ValueError("it contains zero bytes, probably from a power loss")
    record = json.loads(line)
    step = record.get("iteration") if isinstance(record, dict) else None
    if type(step) is not int or not (_is_number(record.get("loss")) or step == 0):
        raise ValueError("it is not a record of a step")
    if wrong := [name for name, value in record.items() if value is not None and not _is_known(name, value)]:
        raise ValueError(f"{wrong[0]} is not a finite number")
    return record


def _is_known(name: str, value) -> bool:
    kinds = {"alarms": list, "expert_load": list, "samples_sha256": str}
    return _is_number(value) or isinstance(value, kinds.get(name, ()))


def _is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _gaps(steps: list[int], last: int) -> list[str]:
    """Messages for the steps missing from 1 to `last`."""
    present = sorted({0, *steps, last + 1})
    gaps = [(low + 1, high - 1) for low, high in itertools.pairwise(present) if high - low > 1]
    return [f"step {a} is missing" if a == b else f"steps {a} to {b} are missing" for a, b in gaps]


def _line(record: dict) -> str:
    # JSON has no NaN or infinity; they become null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
