"""What the trials of a sweep found, and whether they can be compared."""

from typing import Any

from rsft_lib.chain.project_file import TRAIN
from rsft_lib.chain.records import STATUS_FILE
from rsft_lib.chain.steps import folder_of, state
from rsft_lib.chain.sweep import Trial
from rsft_lib.display.html import Table
from rsft_lib.display.runs.runs import open_run
from rsft_lib.display.runs.seeds import Outcome
from rsft_lib.training.run_folder import read_record


def outcomes(trials: list[Trial], metric: str) -> list[Outcome]:
    """The outcomes of the trials that are done.

    Args:
        metric: a number in the `status.json` of a notebook, such as `held_out_loss` of 05 or `scores.think.accuracy` of
            07; else of the last step that has it in `metrics.jsonl`.

    Raises:
        ValueError: trials differ in more than what is varied, and each difference is listed; or one lacks the metric.
    """
    if differing := [line for trial in trials for line in _differences(trial)]:
        raise ValueError(
            "these trials differ from the others in more than what is varied:\n  " + "\n  ".join(differing)
        )
    done = [trial for trial in trials if not trial.first_not_done()]
    return [_outcome(trial, metric) for trial in done]


def status(faults: dict[str, str]) -> dict[str, str]:
    """Whether a sweep is done, for `notebook.finish`, as `launch.Job.status` returns it."""
    if not faults:
        return {"status": "done"}
    return {"status": "stopped", "hint": f"{len(faults)} not done ({', '.join(faults)}): run again to resume"}


def states_table(trials: list[Trial], faults: dict[str, str]) -> Table:
    """Each trial with its state and folder, or why it is not done; a note names differences of their environments."""
    rows = []
    for trial in trials:
        found, name = trial.first_not_done(), trial.project.name
        why = faults.get(name) or (found.why if found else "")
        rows.append((name, found.kind if found else "done", why or str(trial.project.folder)))
    return Table("trials", ("trial", "state", "folder, or why it is not done"), rows, _environments(trials))


def _environments(trials: list[Trial]) -> str:
    """Versions, machine and commit in which trainings that are done differ; empty if in none."""
    found = [read_record(folder_of(trial.project, TRAIN) / STATUS_FILE).get("made_with", {}) for trial in trials]
    values = {name: sorted({one[name] for one in found if name in one}) for one in found for name in one}
    differing = [f"{name}: {' and '.join(several)}" for name, several in values.items() if len(several) > 1]
    return f"the trials were not all made with the same {'; '.join(differing)}" if differing else ""


def _differences(trial: Trial) -> list[str]:
    """What a notebook ran with that is not in the trial's project file, or has changed there or on disk since."""
    lines = []
    for name in trial.notebooks:
        found = state(trial.project, name)
        by_hand = [key for key in found.record.get("given", []) if key != "project"]
        if found.kind == "stale":
            lines.append(f"{trial.project.name}: {found.why}")
        elif by_hand:
            given = ", ".join(f"{key} {found.record['parameters'][key]!r}" for key in by_hand)
            lines.append(f"{trial.project.name}: {name} ran with {given}, given by hand: remove {trial.project.folder}")
    return lines


def _outcome(trial: Trial, metric: str) -> Outcome:
    records = [state(trial.project, name).record for name in reversed(trial.notebooks)]
    run = open_run(folder_of(trial.project, TRAIN), trial.project.name) if TRAIN in trial.notebooks else None
    found = [value for record in records if isinstance(value := _inside(record, metric), int | float)]
    value = found[0] if found else run.last(metric) if run else None
    if value is None:
        raise ValueError(f"{trial.project.name} has no {metric}: choose a number in status.json of {trial.notebooks}")
    return Outcome(trial.values, float(value), run)


def _inside(record: dict, metric: str) -> Any:
    """The value at `a.b.c` in nested dicts; None if there is none."""
    found: Any = record
    for key in metric.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found
