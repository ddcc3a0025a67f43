"""Projects: begin one, run its notebooks, see what is done.

    python -m rsft_lib.project new mine MODEL LONG SHORT
    python -m rsft_lib.project run mine --from 03 --to 07
    python -m rsft_lib.project status mine

`rsft_lib.chain.project_file` describes the file. Exit codes are those of `rsft_lib.notebook`.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from rsft_lib.chain.parameters import read_yaml
from rsft_lib.chain.project_file import (
    BUILD,
    NOTEBOOKS,
    PAIRS,
    SWEEP,
    Project,
    locate,
    notebook_file,
    notebook_number,
    open_project,
)  # fmt: skip
from rsft_lib.chain.report import write_report
from rsft_lib.chain.steps import Chain, state, taken
from rsft_lib.common.cores import usable_cores
from rsft_lib.common.locks import locked
from rsft_lib.common.paths import project_root, require_path, resolve
from rsft_lib.common.temporary import new_file
from rsft_lib.data.records import source_of
from rsft_lib.display.html import Table
from rsft_lib.notebook import run as run_notebook

LAST = "08_loss_lab"  # a sweep (09) trains again and again, so it is run only when asked for; 10 if 03 needs it
LONGEST = 16_384  # positions per pack of a new project, if its model can have as many
HEAD = """\
# Any parameter of a notebook can be set here, in a section with the notebook's name.
# Samples longer than seq_length are dropped; notebook 04 counts them.

"""


def new(
    project: str,
    model: str,
    long: str = "",
    short: str = "",
    *,
    hybrid: str = "",
    questions: str = "",
    seq_length: int = 0,
) -> Path:
    """Begin a project: write its file, which can be edited.

    Args:
        project: its name, or the path of a file or folder elsewhere; see `rsft_lib.chain.project_file`.
        model: Hugging Face model folder, or name on the Hub.
        long, short: data files, or names on the Hub; without `short`, short answers are cut from the long ones.
        hybrid: one dataset, with or without modes, instead of `long` and `short`.
        questions: questions with known answers, if there are no such data: notebook 10 has the model answer them.
        seq_length: positions per pack; by default as many as the model has, at most 16,384.

    Returns:
        The project file.

    Raises:
        FileExistsError: there is such a project.
        FileNotFoundError: model or data do not exist.
        ValueError: the name is not one, or there is no data.
    """
    place = locate(project)
    if not re.fullmatch(r"[\w.-]+", place.name):
        raise ValueError(f"project is {project!r}; a name has letters, digits, '.', '_' and '-' only")
    if place.file.exists():
        raise FileExistsError(f"{place.file} exists: edit it, or choose another name")
    if not (long or hybrid or questions):
        raise ValueError("there is no data; give long and short, hybrid, or questions")
    data = {name: _place(value) for name, value in (("long", long), ("short", short), ("hybrid", hybrid)) if value}
    asked = {PAIRS: {"questions": _place(questions)}} if questions else {}
    for name, value in (data | asked.get(PAIRS, {})).items():
        source_of(value, name)
    place.file.parent.mkdir(parents=True, exist_ok=True)
    gpus = _gpus()
    ranks = gpus or min(2, usable_cores())
    shared = {"model": _model(model), **data, "seq_length": seq_length or _positions(model), "nproc": ranks}
    training = {"epochs": 3.0, "global_batch_size": 16} | ({"layout": "auto"} if gpus else {})
    sections = {"05_train": training} | asked
    with new_file(place.file) as file:
        file.write(HEAD + yaml.safe_dump(shared, sort_keys=False, allow_unicode=True) + "\n" + yaml.safe_dump(sections))
    return place.file


def _place(given: str) -> str:
    """An existing path, from the project root if it is inside, else absolute; a name on the Hub as it is."""
    path = Path(os.path.abspath(resolve(given)))  # without `..`
    if not path.exists():
        return given
    return str(path.relative_to(project_root()) if path.is_relative_to(project_root()) else path)


def _model(given: str) -> str:
    if given.count("/") != 1 or given.startswith((".", "~")):  # not a name on the Hub
        require_path(given, "folder of the model")
    return _place(given)


def _positions(model: str) -> int:
    config = resolve(model) / "config.json"
    return min(LONGEST, read_yaml(config).get("max_position_embeddings", LONGEST)) if config.is_file() else LONGEST


def _gpus() -> int:
    import torch  # slow

    return torch.cuda.device_count()


def run(project: str, first: str = NOTEBOOKS[0], last: str = LAST) -> tuple[Path, str]:
    """Run the notebooks of a project that are not done, in order, and write the report.

    Args:
        first, last: names of notebooks, or how they begin, such as '03'.

    Returns:
        The report, and how to resume if a notebook was stopped; empty if all are done.

    Raises:
        BlockingIOError: another process runs them.
        RuntimeError: a notebook failed.
        ValueError: there is no such project or notebook, or an earlier notebook has to be run first.
    """
    opened = open_project(project)
    names = _to_run(opened, first, last)
    os.chdir(project_root())  # where relative paths of a project start
    executed = opened.folder / "executed"
    executed.mkdir(parents=True, exist_ok=True)
    with locked(opened.folder / "executed", wait=False):
        try:
            hint = next(_stopped(opened, names, executed), "")
        finally:
            report = write_report(opened, status(opened)._repr_html_(), executed)
    return report, hint


def _to_run(project: Project, first: str, last: str) -> list[str]:
    """The notebooks from first to last; 10 before 03 if that takes the pairs, 09 only if it is one of these two."""
    names = list(NOTEBOOKS[notebook_number(first) : notebook_number(last) + 1])
    names = [name for name in names if name != SWEEP or name in (names[0], names[-1])]
    known = {name for name, value in project.parameters[BUILD].items() if value}
    if BUILD in names and project.parameters[PAIRS].get("questions") and "hybrid" in taken(BUILD, known):
        names = [name for name in names if name != PAIRS]
        names.insert(names.index(BUILD), PAIRS)
    return names


def _stopped(project: Project, names: list[str], executed: Path) -> Iterator[str]:
    """Run what is not done; yields how to resume where a notebook was stopped."""
    for name in names:
        found = state(project, name)
        if found.kind == "done":
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: {found.why}" if found.kind == "stale" else name, flush=True)
        _, result = run_notebook(notebook_file(name), executed, {"project": str(project.file)})
        if result["status"] != "done":
            yield f"{name}: {result.get('hint', '')}"


def status(project: Project) -> Table:
    """What is done, stopped, stale or missing in a project, and why."""
    os.chdir(project_root())
    chain, rows = Chain(project), []
    for name in NOTEBOOKS:
        found = chain.state(name)
        given = [key for key in found.record.get("given", []) if key != "project"]
        by_hand = f"given by hand: {', '.join(given)}" if given else ""
        why = found.why if found.record else ""  # it has not run yet
        rows.append((name, found.kind, found.record.get("finished", ""), why or by_hand))
    return Table(f"project {project.name}: {project.folder}", ("notebook", "state", "finished", "why"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rsft_lib.project", description="Begin, run and inspect projects.")
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("new", help="begin a project")
    for name in ("project", "model"):
        begin.add_argument(name)
    for name in ("long", "short"):
        begin.add_argument(name, nargs="?", default="")
    begin.add_argument("--hybrid", default="")
    begin.add_argument("--questions", default="")
    begin.add_argument("--seq-length", type=int, default=0)
    chain = commands.add_parser("run", help="run the notebooks that are not done, and write a report")
    chain.add_argument("project")
    chain.add_argument("--from", dest="first", default=NOTEBOOKS[0], metavar="NOTEBOOK")
    chain.add_argument("--to", dest="last", default=LAST, metavar="NOTEBOOK")
    commands.add_parser("status", help="what is done, stale or missing").add_argument("project")
    arguments = vars(parser.parse_args())
    try:
        match arguments.pop("command"):
            case "new":
                print(new(**arguments))
            case "status":
                print(status(open_project(**arguments)))
            case "run":
                return _run(**arguments)
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(project: str, first: str, last: str) -> int:
    report, hint = run(project, first, last)
    print(f"report  {report}")
    if hint:
        print(f"not done: {hint}", file=sys.stderr)
    return os.EX_TEMPFAIL if hint else 0


if __name__ == "__main__":
    sys.exit(main())
