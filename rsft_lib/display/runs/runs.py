"""Runs to be compared: their metrics as columns, how far they are, and in which settings they differ."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from rsft_lib.common.paths import ROOT, existing, resolve
from rsft_lib.display.html import Table
from rsft_lib.display.live.run_card import duration
from rsft_lib.training.metrics import FILE, scan_metrics
from rsft_lib.training.run_folder import CONFIG, how_it_ended, read_record

BY = {
    "step": "step", "token": "trained tokens", "time": "minutes of training", "share": "share of the run, in per cent",
}  # fmt: skip
MISSING = "–"
PATTERN = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Run:
    """A run folder: `columns` has a float64 [steps] for each metric, NaN where a step has none."""

    name: str
    folder: Path
    columns: dict[str, np.ndarray]
    config: dict
    ended: str
    alarms: list[int]
    problems: list[str]
    """What cannot be read of it."""

    def __len__(self) -> int:
        return len(self.columns["iteration"])

    @property
    def of_one_mode(self) -> bool:
        """Whether it is known that none of its answers begins with a control token."""
        known = {name for name in self.columns if name.startswith("loss_mode_") and self.last(name) is not None}
        return known == {"loss_mode_other"}

    def x(self, by: str) -> np.ndarray:
        """What each step is drawn at; `by` is one of BY."""
        steps = self.columns["iteration"]
        if by == "share":
            return 100 * steps / (_planned(self) or steps[-1])
        if by == "step":
            return steps
        if by == "token":
            return np.cumsum(self.column("trained_tokens"))
        return np.cumsum(self.column("seconds")) / 60

    def column(self, metric: str) -> np.ndarray:
        """Its value at each step; NaN where no step has it."""
        return self.columns.get(metric, np.full(len(self), np.nan))

    def line(self, metric: str, by: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of the steps that have the metric."""
        values = self.column(metric)
        known = np.isfinite(values)
        return self.x(by)[known], values[known]

    def last(self, metric: str) -> float | None:
        values = self.line(metric, "step")[1]
        return float(values[-1]) if len(values) else None


def find_runs(runs: str) -> list[Run]:
    """The runs that a text names: folders, or patterns such as `outputs/checkpoints/*`, comma-separated.

    A folder whose own name has a comma or looks like a pattern is found by it.

    Raises:
        FileNotFoundError: a folder is missing, or a pattern finds no run.
        ValueError: a folder holds no run, or one that has not finished a step yet.
    """
    folders: dict[Path, None] = {}  # as a set that keeps the order
    for part in _parts(runs):
        found = [existing(part, "run folder")] if _is_folder(part) or not PATTERN.search(part) else _matching(part)
        folders |= dict.fromkeys(path.resolve() for path in found)
    if not folders:
        raise ValueError("no run is named; give a run folder, several that are comma-separated, or a pattern")
    return [open_run(folder, name) for folder, name in zip(folders, _names(list(folders)), strict=True)]


def _parts(runs: str) -> Iterator[str]:
    """What stands between the commas, where no folder has them in its name: of several readings the longest."""
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
    """The run folders that a pattern finds; what exists of its path is no pattern."""
    path = resolve(pattern)
    there = next(parent for parent in path.parents if parent.is_dir())
    found = sorted(glob(f"{path.relative_to(there)}/{FILE}", root_dir=there))
    if not found:
        raise FileNotFoundError(
            f"{pattern!r} finds no folder with {FILE} (relative patterns start at {ROOT}): run notebook 05_train"
        )
    return [(there / path).parent for path in found]


def open_run(folder: Path, name: str) -> Run:
    found = scan_metrics(folder)
    records, problems = found.records, found.problems
    if not records:
        why = "; ".join(problems) or "train first (notebook 05_train)"
        raise ValueError(f"{folder} has no metrics yet: {why}")
    metrics = {key for record in records for key, value in record.items() if isinstance(value, int | float)}
    columns = {key: np.array([_number(record.get(key)) for record in records]) for key in metrics}
    alarms = [record["iteration"] for record in records if record.get("alarms")]
    try:
        config = read_record(folder / CONFIG)
    except ValueError as error:
        config, problems = {}, [*problems, str(error)]
    return Run(name, folder, columns, config, how_it_ended(folder) or "running, or killed", alarms, problems)


def runs_table(runs: list[Run]) -> Table:
    """How far each run is, what came out, and what of its files cannot be read."""
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


def differences_table(runs: list[Run]) -> Table:
    """The settings in which the runs are not all alike."""
    different = [name for name in _settings(runs) if len({_said(run, name) for run in runs}) > 1]
    title = "settings that differ" if different else "the runs have the same settings"
    return _table(title, runs, different)


def settings_table(runs: list[Run]) -> Table:
    """All settings of each run."""
    return _table("all settings", runs, _settings(runs))


def _table(title: str, runs: list[Run], names: list[str]) -> Table:
    return Table(
        title, ("setting", *(run.name for run in runs)), [(name, *(_said(run, name) for run in runs)) for name in names]
    )


def _settings(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.config))


def _said(run: Run, name: str) -> str:
    value = run.config.get(name, MISSING)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, or so many parts that no two are alike."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return names


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _planned(run: Run) -> int:
    """Its steps in all; 0 where its settings do not tell."""
    steps = run.config.get("train_iters")
    return steps if type(steps) is int and steps > 0 else 0


def _total(run: Run) -> str:
    return f"{_planned(run):,}" if _planned(run) else MISSING
