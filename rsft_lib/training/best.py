"""The best checkpoint of a run by the metric of its setting `keep_best`.

It is found in what is on disk, the metrics of the steps that have a checkpoint, so a resumed run knows it as well.
"""

from collections.abc import Collection
from pathlib import Path

from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints, last_checkpoint, step_of
from rsft_lib.common.artifact import read_manifest
from rsft_lib.common.paths import require_path
from rsft_lib.training.metrics import scan_metrics


def best_step(run: Path, metric: str, steps: Collection[int]) -> int | None:
    """The one of `steps` with the best value of `metric` in a run folder, the lowest loss or the highest share.

    The first one, if several are equal; None if no step has a value.
    """
    known = _values(run, metric, steps) if metric else {}
    sign = 1 if "loss" in metric else -1
    return min(known, key=lambda step: sign * known[step], default=None)


def best_of(run: Path) -> str:
    """What the best checkpoint in a run folder is, for people; empty if the run keeps none, or has none yet."""
    metric, step = _kept(run)
    return "" if step is None else f"step {step:,}: {metric} {_values(run, metric, [step])[step]:.4g}"


def chosen_checkpoint(run: str | Path, which: str) -> Path:
    """The newest intact checkpoint of a run folder ('last'), or the one that is best by its `keep_best` ('best').

    Raises:
        FileNotFoundError: the folder does not exist, or has no such checkpoint.
        ValueError: `which` is something else, `keep_best` is not set, or the checkpoint is damaged.
    """
    if which not in ("last", "best"):
        raise ValueError(f"which is {which!r}; choose last or best")
    if which == "last":
        return last_checkpoint(run)
    folder = require_path(run, "run folder")
    metric, step = _kept(folder)
    if not metric:
        raise ValueError(f"{folder} was trained without keep_best, so no checkpoint is known as the best: choose last")
    if step is None:
        raise FileNotFoundError(f"{folder} has no checkpoint at a step with {metric}")
    from rsft_lib.checkpoint import any_format  # slow; the functions above need none of its libraries

    any_format.check(checkpoint_folder(folder, step))
    return checkpoint_folder(folder, step)


def _kept(run: Path) -> tuple[str, int | None]:
    """The metric of `keep_best`, as the newest checkpoint has it, and the step of the best one."""
    saved = checkpoints(run)
    metric = read_manifest(saved[-1]).get("config", {}).get("keep_best", "") if saved else ""
    return metric, best_step(run, metric, [*map(step_of, saved)])


def _values(run: Path, metric: str, steps: Collection[int]) -> dict[int, float]:
    records = {record["iteration"]: record for record in scan_metrics(run).records}
    values = {step: records.get(step, {}).get(metric) for step in steps}
    return {step: value for step, value in values.items() if value is not None}
