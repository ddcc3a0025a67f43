"""A sweep: runs of one project that differ in chosen parameters, each run a project of its own, called a trial.

    lr: [1.0e-5, 2.0e-5]    # a list of values: every combination with those of other parameters
    seed: [1, 2, 3]
    train_iters: 500        # the same in every trial

Or a list of such mappings without lists in them, which are the trials. A name without a notebook is a parameter of 05,
else one that projects share, else of the only notebook that has it; others are written `03_build_dataset.seed`. A trial
runs the notebooks from the first that has one of these parameters; what earlier ones make is the base's.
"""

import hashlib
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rsft_lib.chain.parameters import checked, committed_parameters, declared_parameters
from rsft_lib.chain.project_file import (
    NOTEBOOKS,
    SHARED,
    SWEEP,
    TRAIN,
    Project,
    ProjectError,
    notebook_file,
    notebook_number,
    open_project,
)  # fmt: skip
from rsft_lib.chain.steps import State, state, taken
from rsft_lib.common.paths import resolve
from rsft_lib.common.temporary import new_file

EXAMPLE = "{lr: [1e-5, 2e-5], seed: [1, 2, 3]}"
PLACES = {"project", "output", "filtered"}  # parameters that a trial has of its own
LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True)
class Trial:
    """A project, the parameters in which it differs from the base, as named in the sweep, and the notebooks it runs."""

    project: Project
    values: dict[str, Any]
    notebooks: tuple[str, ...]

    def first_not_done(self) -> State | None:
        """The state of the first notebook that is not done; None if all are."""
        return next((found for name in self.notebooks if (found := state(self.project, name)).kind != "done"), None)


def plan(project: str, vary: str, folder: str | Path, last: str = "") -> list[Trial]:
    """The trials of a sweep over a project; each one's project file is written.

    Args:
        project: name or path of the base.
        vary: YAML, as above.
        folder: for the trials; each has a folder there, named by its values.
        last: the last notebook of every trial; by default 05, or the last one with a varied parameter.

    Raises:
        ProjectError: a notebook of the project, whose output the trials take, is missing or stale; or a user saved a
            value in the parameters cell of one that they run, where it would replace the trials'.
        ValueError: `vary` or `last` is invalid; the message says what was expected.
    """
    base, rows = open_project(project), _rows(vary)
    takers = {name: _takers(name) for row in rows for name in row}
    trials = [{name: _value(base, takers[name], name, row) for name in takers} for row in rows]
    names = [_folder_name(values) for values in trials]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"vary has {', '.join(sorted(twice))} more than once")
    notebooks = _notebooks(takers, last)
    inputs = {name: _inputs(base, name, notebooks) for name in notebooks}
    _refuse_typed(notebooks)
    made = []
    for name, values in zip(names, trials, strict=True):
        file = resolve(folder) / name / "project.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(file) as opened:
            yaml.safe_dump(_sections(base, inputs, takers, values), opened, sort_keys=False, allow_unicode=True)
        made.append(Trial(open_project(file), values, notebooks))
    return made


def _rows(vary: str) -> list[dict[str, Any]]:
    """The trials' values as written: the combinations of a grid, or the rows of a list."""
    try:
        parsed = yaml.safe_load(vary)
    except yaml.YAMLError as error:
        raise ValueError(f"vary is not YAML: {error}; expected something like {EXAMPLE}") from None
    if isinstance(parsed, dict) and parsed and [] not in parsed.values():
        choices = [values if isinstance(values, list) else [values] for values in parsed.values()]
        return [dict(zip(parsed, row, strict=True)) for row in itertools.product(*choices)]
    if isinstance(parsed, list) and parsed and all(isinstance(row, dict) and row for row in parsed):
        return parsed
    raise ValueError(f"vary is {vary!r}; expected something like {EXAMPLE}, or a list of {{name: value}}")


def _takers(name: str) -> tuple[str, ...]:
    """The notebooks whose parameter is meant."""
    notebook, _, parameter = str(name).rpartition(".")
    before = NOTEBOOKS[: NOTEBOOKS.index(SWEEP)]
    having = [one for one in before if parameter in declared_parameters(notebook_file(one))]
    if notebook:
        having = [one for one in having if one == NOTEBOOKS[notebook_number(notebook)]]
    elif TRAIN in having:
        having = [TRAIN]
    elif parameter in SHARED:
        having = [one for one in SHARED[parameter] if one in before]
    elif len(having) > 1:
        raise ValueError(f"{name} is a parameter of {', '.join(having)}: write {having[0]}.{name} in vary")
    if not having or parameter in PLACES:
        raise ValueError(f"vary has {name!r}; expected a parameter of notebooks 01 to 08, such as lr or 07.temperature")
    return tuple(having)


def _value(base: Project, takers: tuple[str, ...], name: str, row: dict[str, Any]) -> Any:
    """The value in a row, of the declared type; the project's, if the row has none."""
    parameter = name.rpartition(".")[2]
    declared = declared_parameters(notebook_file(takers[0]))
    default = base.parameters[takers[0]].get(parameter, declared[parameter].default)
    return checked({parameter: row.get(name, default)}, declared, f"vary, {takers[0]}: ")[parameter]


def _folder_name(values: dict[str, Any]) -> str:
    """Such as `lr=0.001_seed=1`; with a hash, where a value is no name or they are long."""
    text = "_".join(f"{name}={value}" for name, value in values.items())
    plain = re.sub(r"[^\w.=+-]", "-", text)
    if plain == text and len(text) <= LONGEST:
        return text
    return f"{plain[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _notebooks(takers: dict[str, tuple[str, ...]], last: str) -> tuple[str, ...]:
    """From the first notebook with a varied parameter to `last`."""
    numbers = sorted(NOTEBOOKS.index(name) for names in takers.values() for name in names)
    end = notebook_number(last) if last else max(numbers[-1], NOTEBOOKS.index(TRAIN))
    if not numbers[-1] <= end < NOTEBOOKS.index(SWEEP):
        raise ValueError(
            f"last is {last!r}; expected {NOTEBOOKS[numbers[-1]]}, which has a varied parameter, or one of 06 to 08"
        )
    return NOTEBOOKS[numbers[0] : end + 1]


def _inputs(base: Project, notebook: str, own: tuple[str, ...]) -> dict[str, str]:
    """The inputs of a notebook that notebooks of the base made, not those of the trial."""
    inputs = {}
    known = {name for name, value in base.parameters[notebook].items() if value}
    for name, (maker, fact) in taken(notebook, known).items():
        if maker not in own:
            found = state(base, maker)
            if found.kind != "done":
                command = f"python -m rsft_lib.project run {base.file} --to {maker[:2]}"
                raise ProjectError(f"{found.why}; a sweep takes its output, so run this first: {command}")
            inputs[name] = found.made(fact)
    return inputs


def _sections(base: Project, inputs: dict, takers: dict[str, tuple[str, ...]], values: dict[str, Any]) -> dict:
    """The content of a trial's project file: the base's parameters, its outputs as inputs, and the trial's values."""
    sections = {
        notebook: {name: value for name, value in base.parameters[notebook].items() if name not in PLACES}
        | inputs.get(notebook, {})
        for notebook in NOTEBOOKS if notebook != SWEEP
    }  # fmt: skip
    for name, value in values.items():
        for taker in takers[name]:
            sections[taker][name.rpartition(".")[2]] = value
    return {notebook: section for notebook, section in sections.items() if section}


def _refuse_typed(notebooks: tuple[str, ...]) -> None:
    for name in notebooks:
        declared, committed = (read(notebook_file(name)) for read in (declared_parameters, committed_parameters))
        if typed := [key for key, value in declared.items() if value != committed.get(key, value)]:
            raise ProjectError(
                f"{name} has values of {', '.join(typed)} saved in its parameters cell, which all trials would take: "
                "undo the change, or commit it as the new default"
            )
