"""`metrics.jsonl`: one JSON object per line, written by one rank and read by notebooks; and who else is told.

A line may be damaged, by a power loss or a full disk. It is passed over, and everyone who reads the file says so.
"""

import itertools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

from rsft_lib.common.temporary import new_file
from rsft_lib.training.config import TrainConfig

FILE = "metrics.jsonl"
DAMAGED = "metrics.damaged.jsonl"  # what it was before a run went on without the lines that cannot be read
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Appends records; each is on disk before the next step begins."""

    def __init__(self, folder: Path, iteration: int):
        """Open the file to go on after `iteration`: later records, of a run that was lost, are removed.

        Lines that cannot be read and steps that are missing are printed; a damaged file is kept beside the new one.
        """
        path, found = folder / FILE, scan_metrics(folder)
        kept = [record for record in found.records if record["iteration"] <= iteration]
        for problem in [*found.damaged, *_gaps([record["iteration"] for record in kept], iteration)]:
            print(f"{path}: {problem}", flush=True)
        if found.damaged:
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
    """The same records as TensorBoard's scalars; those of steps that were lost are hidden from it."""

    def __init__(self, folder: Path, iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=iteration + 1)

    def write(self, iteration: int, **record) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """The same records for Weights & Biases; a resumed run goes on under its id, which lies in the run folder."""

    def __init__(self, folder: Path, iteration: int, config: TrainConfig):
        import wandb

        kept = folder / "wandb_id.txt"
        self.run = wandb.init(
            project=config.wandb_project, config=config.to_json(), dir=str(folder), name=folder.name,
            id=kept.read_text(encoding="utf-8") if kept.exists() else None, resume="allow",
        )  # fmt: skip
        kept.write_text(self.run.id, encoding="utf-8")

    def write(self, iteration: int, **record) -> None:
        self.run.log({name: value for name, value in record.items() if value is not None}, step=iteration)

    def close(self) -> None:
        self.run.finish()


def open_writers(folder: Path, iteration: int, config: TrainConfig) -> list:
    """Everyone who is told of each step, to go on after `iteration`."""
    writers = [MetricsWriter(folder, iteration)]
    if config.tensorboard:
        writers.append(TensorBoard(folder, iteration))
    if config.wandb_project:
        writers.append(Wandb(folder, iteration, config))
    return writers


class Metrics(NamedTuple):
    """What a run folder's file holds."""

    records: list[dict]
    """In order; those that can be read."""
    damaged: list[str]
    """A sentence for each line that cannot be read as it is."""
    gaps: list[str]
    """A sentence for each range of steps that no record is of, up to the last one."""

    @property
    def problems(self) -> list[str]:
        """All that is wrong with the file, with its name."""
        return [f"{FILE}: {problem}" for problem in (*self.damaged, *self.gaps)]


def scan_metrics(folder: Path) -> Metrics:
    """The records of a run folder, and what is wrong with them; nothing when it has not begun.

    The last line is not looked at while it is half written.
    """
    path = Path(folder) / FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record, problem = parse(line)
        records += [record] if record else []
        damaged += [f"line {number} is damaged ({problem})"] if problem else []
    steps = [record["iteration"] for record in records]
    return Metrics(records, damaged, _gaps(steps, max(steps, default=0)))


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run folder that can be read, in order."""
    return scan_metrics(folder).records


def parse(line: bytes) -> tuple[dict | None, str]:
    """The record in a line, and what is wrong with the line: another one may follow what was damaged."""
    try:
        return _record(line), ""
    except (ValueError, RecursionError) as error:
        begin = line.rfind(b'{"iteration"')
        return (parse(line[begin:])[0] if begin > 0 else None), str(error)


def _keep(path: Path) -> None:
    """Copy a damaged file to a name that is free: whenever the process is killed, the file itself is still there."""
    others = (f"metrics.damaged-{number}.jsonl" for number in itertools.count(2))
    names = map(path.with_name, itertools.chain([DAMAGED], others))
    with new_file(next(name for name in names if not name.exists()), "wb") as file:
        file.write(path.read_bytes())


def _record(line: bytes) -> dict:
    if b"\0" in line:
        raise ValueError("it holds zero bytes, as a power loss leaves them")
    record = json.loads(line)
    if not isinstance(record, dict) or type(record.get("iteration")) is not int or not _is_number(record.get("loss")):
        raise ValueError("it is not a record of a step")
    if wrong := [name for name, value in record.items() if value is not None and not _is_known(name, value)]:
        raise ValueError(f"{wrong[0]} is no number that can be drawn")
    return record


def _is_known(name: str, value) -> bool:
    return _is_number(value) or isinstance(value, {"alarms": list, "samples_sha256": str}.get(name, ()))


def _is_number(value) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # of an integer that no float can hold
        return False


def _gaps(steps: list[int], last: int) -> list[str]:
    """What is missing among steps that should be 1, 2, 3 and so on to `last`."""
    there = sorted({0, *steps, last + 1})
    holes = [(low + 1, high - 1) for low, high in itertools.pairwise(there) if high - low > 1]
    return [f"step {a} is missing" if a == b else f"steps {a} to {b} are missing" for a, b in holes]


def _line(record: dict) -> str:
    # JSON has no NaN: what is not a number is null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
