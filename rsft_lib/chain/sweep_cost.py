"""What a sweep costs, before it starts: trials, time and disk, from a training that has been run."""

from typing import NamedTuple

from rsft_lib.chain.project_file import TRAIN, Project, open_project
from rsft_lib.chain.steps import state
from rsft_lib.chain.sweep import Trial
from rsft_lib.common.paths import resolve
from rsft_lib.display.html import Table
from rsft_lib.display.live.run_card import duration
from rsft_lib.training.metrics import read_metrics


class Known(NamedTuple):
    """A training that has been run: its folder, parameters, seconds of all steps, and bytes."""

    folder: str
    parameters: dict
    seconds: float
    size: int


def cost_table(project: str, trials: list[Trial], places: list[dict[str, str]]) -> Table:
    """Trials, notebooks of each, how many run at a time, and the expected time and disk of those that are not done."""
    left = [trial for trial in trials if trial.first_not_done()]
    rows = [
        ("trials", f"{len(trials)}, of which {len(trials) - len(left)} are done"),
        ("notebooks of each", ", ".join(trials[0].notebooks)),
        ("at a time", f"{len(places)} {_place(places[0])}"),
    ]
    return Table("cost", ("", ""), rows + (_expected(project, trials, left, len(places)) if left else []))


def _place(place: dict[str, str]) -> str:
    gpus = place.get("CUDA_VISIBLE_DEVICES", "")
    return f"({gpus.count(',') + 1} GPUs each)" if gpus else ""


def _expected(project: str, trials: list[Trial], left: list[Trial], places: int) -> list[tuple[str, str]]:
    if TRAIN not in trials[0].notebooks:
        return [("training", "none")]
    known = next(filter(None, map(_known, [*(trial.project for trial in trials), open_project(project)])), None)
    if not known:
        return [("training", "unknown: no training of this project is done, the first trial will show it")]
    planned = [known.parameters | trial.project.parameters[TRAIN] for trial in left]
    if any(bool(one["epochs"]) != bool(known.parameters["epochs"]) for one in planned):
        return [("training", f"unknown: either the trials or {known.folder} have epochs, the others train_iters")]
    each = [known.seconds * _work(one) / _work(known.parameters) for one in planned]
    span = duration(min(each)) if max(each) < 1.01 * min(each) else f"{duration(min(each))} to {duration(max(each))}"
    together = duration(max(sum(each) / places, *each))
    return [
        ("training, each", f"{span}, as the run in {known.folder} took {duration(known.seconds)}"),
        ("training, together", f"about {together}, and up to half a minute more for each notebook to start"),
        ("disk", f"{len(left) * known.size / 1e9:,.2f} GB, with as many checkpoints as there"),
    ]


def _known(project: Project) -> Known | None:
    found = state(project, TRAIN)
    if found.kind != "done":
        return None
    folder = resolve(found.record["parameters"]["output"])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Known(str(folder), found.record["parameters"], sum(one["seconds"] for one in read_metrics(folder)), size)


def _work(parameters: dict) -> float:
    """Positions of a training; of one given by epochs, epochs."""
    steps = parameters["train_iters"] * parameters["global_batch_size"] * parameters["seq_length"]
    return parameters["epochs"] or steps
