"""Runs to be compared: metrics as columns, progress, and differing settings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from rsft_lib.common.paths import require_path, resolve
from rsft_lib.display.html import Table
from rsft_lib.display.live.run_card import duration
from rsft_lib.display.metric_styles import held_out_sets
from rsft_lib.training.metrics import FILE, scan_metrics
from rsft_lib.training.run_folder import CONFIG, how_it_ended, read_record

BY = {
    "step": "step", "token": "trained tokens", "time": "minutes of training", "share": "percent of the run",
}  # fmt: skip
MISSING = "–"
PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Run:
    """A run folder: `columns` has float64 [steps] for each metric, NaN where a step lacks it.

    Step 0 is among them if the model was evaluated before the first.
    """

    name: str
    folder: Path
    columns: dict[str, np.ndarray]
    config: dict
    ended: str
    alarms: list[int]
    problems: list[str]
    """Messages about unreadable files or lines."""

    def __len__(self) -> int:
        return int(np.count_nonzero(self.columns["iteration"]))

    @property
    def of_one_mode(self) -> bool:
        """Whether its data has no control tokens: the only loss by mode is that of 'other'."""
        known = {name for name in self.columns if name.startswith("loss_mode_") and self.last(name) is not None}
        return known == {"loss_mode_other"}

    def x(self, by: str) -> np.ndarray:
        """The x value of each step, float64 [steps]; `by` is a key of BY."""
        steps = self.columns["iteration"]
        if by == "share":
            return 100 * steps / (_planned(self) or steps[-1])
        if by == "step":
            return steps
        if by == "token":
            return np.nancumsum(self.column("trained_tokens"))
        return np.nancumsum(self.column("seconds")) / 60

    def column(self, metric: str) -> np.ndarray:
        """A metric, float64 [steps]; all NaN if no step has it."""
        return self.columns.get(metric, np.full_like(self.columns["iteration"], np.nan))

    def line(self, metric: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of the steps that have the metric."""
        values = self.column(metric)
        known = np.isfinite(values)
        return self.x(by)[known], values[known]

    def last(self, metric: str) -> float | None:
        values = self.line(metric, "step")[1]
        return float(values[-1]) if len(values) else None


def find_runs(runs: str) -> list[Run]:
    """Open the runs given as comma-separated folders or patterns such as `outputs/checkpoints/*`.

    A folder whose name contains a comma or wildcard is found by its name.

    Raises:
        FileNotFoundError: a folder is missing, or a pattern matches no run.
        ValueError: no run is given, or a folder has no metrics yet.
    """
    folders: dict[Path, None] = {}  # as a set that keeps the order
    for part in _parts(runs):
        paths = [require_path(part, "run folder")] if _is_folder(part) or not PATTERN.search(part) else _matching(part)
        folders |= dict.fromkeys(path.resolve() for path in paths)
    if not folders:
        raise ValueError("no run given; expected run folders or patterns, comma-separated")
    return [open_run(folder, name) for folder, name in zip(folders, _names(list(folders)), strict=True)]


def _parts(runs: str) -> Iterator[str]:
    """Split at commas, but not inside the name of an existing folder; the longest such name wins."""
    pieces = runs.split(",")
    while pieces:
        ends = range(len(pieces), 0, -1)
        joined = (",".join(pieces[:end]).strip() for end in ends)
        end, part = next(((e, text) for e, text in zip(ends, joined, strict=True) if _is_folder(text)), (1, pieces[0]))
        pieces = pieces[end:]
        if part.strip():
            yield part.strip()


def _is_folder(text: str) -> bool:
    return bool(text) and resolve(text).is_dir()


def _matching(pattern: str) -> list[Path]:
    """The run folders that match a pattern; its existing parent folders are taken literally."""
    path = resolve(pattern)
    base = next(parent for parent in path.parents if parent.is_dir())
    matches = sorted(glob(f"{path.relative_to(base)}/{FILE}", root_dir=base))
    if not matches:
        raise FileNotFoundError(f"{pattern!r} matches no folder with {FILE} in {Path.cwd()}: run notebook 05_train")
    return [(base / path).parent for path in matches]


def open_run(folder: Path, name: str) -> Run:
    scan = scan_metrics(folder)
    records, problems = scan.records, scan.problems
    if not records:
        why = "; ".join(problems) or "train first (notebook 05_train)"
        raise ValueError(f"{folder} has no metrics yet: {why}")
    records = [scan.start, *records] if scan.start else records
    metrics = {key for record in records for key, value in record.items() if isinstance(value, int | float)}
    columns = {key: np.array([_number(record.get(key)) for record in records]) for key in metrics}
    alarms = [record["iteration"] for record in records if record.get("alarms")]
    try:
        config = read_record(folder / CONFIG)
    except ValueError as error:
        config, problems = {}, [*problems, str(error)]
    return Run(name, folder, columns, config, how_it_ended(folder) or "running, or killed", alarms, problems)


def runs_table(runs: list[Run]) -> Table:
    """Progress, losses, throughput and alarms of each run, and problems with its files."""
    rows = []
    for run in runs:
        seconds, tokens = np.nansum(run.column("seconds")), np.nansum(run.column("trained_tokens"))
        speeds = run.line("tokens_per_second", "step")[1]
        held_out = run.line("eval_loss", "step")
        best = int(held_out[1].argmin()) if len(held_out[1]) else None
        lowest = MISSING if best is None else f"{held_out[1][best]:.3f} at {held_out[0][best]:,.0f}"
        rows.append((
            run.name, f"{run.columns['iteration'][-1]:,.0f} of {_total(run)}", run.ended,
            f"{run.last('loss'):.3f}", lowest, f"{tokens:,.0f}", duration(seconds),
            f"{np.median(speeds):,.0f}" if len(speeds) else MISSING, str(len(run.alarms)),
        ))  # fmt: skip
    columns = (
        "run", "steps", "ended", "last loss", "best held-out loss", "trained tokens", "time", "tokens/s, median",
        "alarms",
    )  # fmt: skip
    note = "; ".join(f"{run.name}: {problem}" for run in runs for problem in run.problems)
    return Table("runs", columns, rows, note)


def held_out_table(runs: list[Run]) -> Table:
    """The loss on each held-out set: before the first step, at its lowest, and in the last evaluation."""
    rows = []
    for run in runs:
        for name, metric in held_out_sets(run.columns).items():
            steps, values = run.line(metric, "step")
            best = int(values.argmin())
            before = f"{values[0]:.3f}" if steps[0] == 0 else MISSING
            rows.append((run.name, name, before, f"{values[best]:.3f} at {steps[best]:,.0f}", f"{values[-1]:.3f}"))
    columns = ("run", "held-out data", "loss before the first step", "lowest", "last")
    return Table("held-out losses" if rows else "no run was evaluated on held-out data", columns if rows else (), rows)


def differences_table(runs: list[Run]) -> Table:
    """The settings in which the runs differ."""
    different = [name for name in _settings(runs) if len({_value(run, name) for run in runs}) > 1]
    title = "settings that differ" if different else "the runs have the same settings"
    return _table(title, runs, different)


def settings_table(runs: list[Run]) -> Table:
    """All settings of each run."""
    return _table("all settings", runs, _settings(runs))


def _table(title: str, runs: list[Run], names: list[str]) -> Table:
    rows = [(name, *(_value(run, name) for run in runs)) for name in names]
    return Table(title, ("setting", *(run.name for run in runs)), rows)


def _settings(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.config))


def _value(run: Run, name: str) -> str:
    value = run.config.get(name, MISSING)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(folders: list[Path]) -> list[str]:
    """The shortest path suffixes that distinguish the folders."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return names


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _planned(run: Run) -> int:
    """Its configured number of steps; 0 if unknown."""
    steps = run.config.get("train_iters")
    return steps if type(steps) is int and steps > 0 else 0


def _total(run: Run) -> str:
    return f"{_planned(run):,}" if _planned(run) else MISSING
