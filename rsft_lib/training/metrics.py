"""`metrics.jsonl`: one JSON object per line, written by one rank and read by notebooks; and who else is told."""

import json
import math
import os
from pathlib import Path

from rsft_lib.training.config import TrainConfig

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Appends records; each is on disk before the next step begins."""

    def __init__(self, folder: Path, iteration: int):
        """Open the file to go on after `iteration`: later records, of a run that was lost, are removed."""
        path = folder / FILE
        kept = [record for record in read_metrics(folder) if record["iteration"] <= iteration]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
        temporary.replace(path)
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


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run folder, in order; none when it has not begun, and no half-written last line."""
    path = Path(folder) / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(record: dict) -> str:
    # JSON has no NaN: what is not a number is null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
