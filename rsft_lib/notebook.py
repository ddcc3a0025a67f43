"""Notebooks as runs: checked parameters with their origins, and a status that only the last cell writes.

papermill alone only warns of an unknown parameter, keeps `1e-5` from YAML as a string, and marks every cell completed
if the kernel was killed. Run headless with either of

    python -m rsft_lib.notebook notebooks/05_train.ipynb outputs/executed -p lr 2e-5
    papermill notebooks/05_train.ipynb outputs/executed/05_train.ipynb -p lr 2e-5

The exit code is 0 on success, and 75 (EX_TEMPFAIL of sysexits.h) if the run was stopped and can be resumed; papermill
exits with 1 in that case.
"""

import argparse
import ast
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

from IPython.display import display
from tqdm import tqdm

from rsft_lib.chain.parameters import checked, committed_parameters, declared_parameters, read_yaml
from rsft_lib.chain.project_file import ProjectError, notebook_file, open_project
from rsft_lib.chain.records import STATUS_FILE, identities
from rsft_lib.chain.steps import GIVEN, Chain, Value, folder_of
from rsft_lib.common.artifact import write_json
from rsft_lib.common.mappings import pairs as pairs  # for notebooks
from rsft_lib.common.paths import project_root, require_path, resolve
from rsft_lib.display.live.kernel_events import somebody_looks
from rsft_lib.display.parameters import ParameterList

STATUS = "application/vnd.rsft.status+json"


class Stopped(RuntimeError):
    """The run was stopped and can be resumed by running it again; shown without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _AboveProgressBar:
    """A stream for cell output that keeps papermill's progress bar on the last line."""

    def write(self, text: str) -> None:
        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


def begin(namespace: dict, name: str, status: str = "") -> SimpleNamespace:
    """Check the parameters of a running notebook, show them with their origin, and return them.

    Call it in the cell after the parameters as `begin(globals(), "05_train")`. Parameters that are not given by hand
    come from the project, from its earlier notebooks, or are the defaults. It removes the `status.json` of any earlier
    run. From here on relative paths start at the project root, wherever the notebook lies.

    Args:
        status: the parameter that names the notebook's own folder, for notebooks that write nothing else into their
            output.

    Returns:
        The parameters; besides them `folder`, the notebook's own one, and `record`, what `finish` writes of them. An
        `output` given by hand is not part of the project, and neither is this run of the notebook.

    Raises:
        ProjectError: there is no such project, or an input is missing or stale and a notebook has to be run first.
        ValueError: parameters are unknown or have the wrong type; the message lists all of them.
    """
    os.chdir(project_root())
    given = _given(namespace, name)
    declared = declared_parameters(notebook_file(name))
    folder = Path("outputs", name)
    if "project" in declared:
        project = open_project(given.get("project", declared["project"].default))
        values = Chain(project).resolved(name, given)
        folder = folder if values["output"].origin == GIVEN else folder_of(project, name)
    else:
        values = {key: Value(given[key], GIVEN) if key in given else Value(declared[key].default) for key in declared}
    plain = {key: value.value for key, value in values.items()}
    folder = resolve(plain[status] if status else folder)
    (folder / STATUS_FILE).unlink(missing_ok=True)
    display(ParameterList(values))
    record = {"parameters": plain, "given": list(given), "inputs": identities(plain)}
    return SimpleNamespace(**plain, folder=folder, record=record)


def _given(namespace: dict, name: str) -> dict:
    """The parameters given by hand: injected by papermill, or typed into their cell."""
    declared, committed = declared_parameters(notebook_file(name)), committed_parameters(notebook_file(name))
    typed = [key for key in declared if namespace[key] != committed.get(key, declared[key]).default]
    injected = _injected(namespace.get("In", []))
    return checked({key: namespace[key] for key in dict.fromkeys([*injected, *typed])}, declared)


def finish(parameters: SimpleNamespace, **facts) -> None:
    """Write `status.json` into the notebook's folder: it ran to its end. Call it in the last cell.

    Args:
        parameters: as `begin` returned them.
        facts: results of the run. The headless runner prints `summary`, a string. A `status` of "stopped" marks a run
            that is not done, and `hint` explains how to resume it.

    Raises:
        Stopped: the run was stopped and is headless, so that the exit code is not 0.
    """
    path = parameters.folder / STATUS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    record = dict(parameters.record)
    record["inputs"] = identities(record["parameters"]) | record["inputs"]  # the tiny model was made meanwhile
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status = {"status": "done", "finished": now, **record, **facts}
    write_json(path, status)
    lines = [facts.get("summary", ""), facts.get("hint", ""), f"{status['status']}: {path}"]
    display({STATUS: status, "text/plain": "\n".join(filter(None, lines))}, raw=True)
    if status["status"] == "stopped" and not somebody_looks():
        raise Stopped(f"not done: {facts.get('hint', '')}")


def kernel_options() -> dict[str, str]:
    """Options of jupyter_client's `KernelManager` for one kernel: on Linux, Unix sockets in place of ports.

    The manager looks for free ports, but the kernel binds them later, when another process may have taken one. Abstract
    sockets have names of their own, no files that stay behind, and no paths that can be too long.
    """
    options = {"transport_encryption": "auto"}  # other users can reach sockets of either kind
    return {**options, "transport": "ipc", "ip": f"@rsft-{uuid4()}"} if sys.platform == "linux" else options


def run(notebook: str | Path, folder: str | Path, parameters: dict) -> tuple[Path, dict]:
    """Execute a notebook with papermill.

    Returns:
        The path of the executed notebook in `folder`, and the facts passed to `finish`, whose `status` is "done" or
        "stopped".

    Raises:
        ValueError: a parameter is unknown or has the wrong type, and nothing was run; or an input is missing or stale.
        RuntimeError: a cell failed, or the last cell was not reached.
    """
    # Imported here, because every notebook kernel imports this module and these imports are slow.
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    from rsft_lib.launch.failure import RunStopped

    notebook = require_path(notebook, "notebook")
    parameters = checked(parameters, declared_parameters(notebook))
    executed = resolve(folder) / notebook.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            notebook, executed, parameters, cwd=str(project_root()), stdout_file=_AboveProgressBar(),
            config=Config({"KernelManager": kernel_options()}),
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == RunStopped.__name__:
            return executed, {"status": "stopped", "hint": error.evalue}
        if error.ename == ProjectError.__name__:
            raise ProjectError(error.evalue) from None
        if error.ename != Stopped.__name__:
            raise RuntimeError(
                f"cell {error.exec_count} of {notebook.name} failed with {error.ename}: {error.evalue}\n"
                f"The executed notebook shows where: {executed}"
            ) from None
    except DeadKernelError:
        raise RuntimeError(f"the kernel of {notebook.name} was killed (out of memory?); see {executed}") from None
    last = [cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"][-1]
    for output in last.outputs:
        if STATUS in output.get("data", {}):
            return executed, output["data"][STATUS]
    raise RuntimeError(f"{notebook.name} did not reach its last cell; was its kernel killed? See {executed}")


def _injected(executed_cells: list[str]) -> list[str]:
    """Names assigned in the cell that papermill injects, which begins with a fixed comment."""
    names = []
    for source in executed_cells:
        if source.startswith("# Parameters\n"):
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            names += [node.id for node in nodes if isinstance(node.ctx, ast.Store)]
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook headless, with checked parameters.")
    parser.add_argument("notebook", help="notebook to run")
    parser.add_argument("folder", help="folder for the executed notebook")
    parser.add_argument("-f", "--file", type=Path, help="YAML file with parameters")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    try:
        from_file = read_yaml(arguments.file) if arguments.file else {}
        executed, status = run(arguments.notebook, arguments.folder, from_file | dict(arguments.parameter))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{status.get('summary', '')}\nexecuted notebook  {executed}")
    if status["status"] == "stopped":
        print(f"not done: {status.get('hint', '')}", file=sys.stderr)
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
