"""The checkpoints in a run folder: their names, which of them a training wrote, and the newest intact one."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rsft_lib.common.artifact import DamagedError, read_manifest, verify
from rsft_lib.common.paths import require_path


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """The path of the checkpoint of `run` after `iteration` steps."""
    return Path(run) / f"iter_{iteration:07d}"


def is_run(folder: Path) -> bool:
    """Whether a folder is one that a training writes, with or without a checkpoint."""
    return (folder / "job.json").exists() or (folder / "metrics.jsonl").exists() or bool(checkpoints(folder))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("iter_"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints that a training run wrote into its folder, ordered by step; only their manifests are read.

    Folders with another name, such as `iter_best` or `iter_0000009_backup`, or another manifest are ignored.
    """
    return [folder for folder in _checkpoint_folders(run) if not _defect(folder)]


def intact(run: Path, check: Callable[[Path], object] = verify) -> Iterator[Path]:
    """The checkpoints of a run folder that pass `check`, newest first; damaged ones are reported and skipped."""
    for folder in reversed(_checkpoint_folders(run)):
        try:
            if defect := _defect(folder):
                raise DamagedError(defect)
            check(folder)
        except (OSError, DamagedError) as error:
            print(f"skipping a checkpoint: {error}", flush=True)
        else:
            yield folder


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder of which all files are intact, or None."""
    return next(intact(run), None)


def last_checkpoint(run: str | Path) -> Path:
    """The newest checkpoint of a run folder whose weights are intact; the optimizer's files are not read.

    Raises:
        FileNotFoundError: the folder does not exist or has no intact checkpoint.
        ValueError: the newest one is unsafe.
    """
    from rsft_lib.checkpoint import any_format  # slow; the functions above need none of its libraries

    folder = require_path(run, "run folder")
    if checkpoint := next(intact(folder, any_format.check), None):
        return checkpoint
    raise FileNotFoundError(f"{folder} has no intact checkpoint: run notebook 05_train until it has saved one")


def _checkpoint_folders(run: Path) -> list[Path]:
    paths = [p for p in Path(run).glob("iter_*") if p.name[5:].isdecimal() and p.is_dir()]
    return [path for path in sorted(paths, key=step_of) if path == checkpoint_folder(run, step_of(path))]


def _defect(folder: Path) -> str:
    """Why a folder named like a checkpoint is not the one that training wrote at this step; "" if it is."""
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError) as error:
        return str(error)
    made_by, iteration = manifest.get("made_by"), manifest.get("iteration")
    if (made_by, iteration) == ("train", step_of(folder)):
        return ""
    return f"{folder} is not the checkpoint of this step: its manifest has made_by {made_by}, iteration {iteration}"
