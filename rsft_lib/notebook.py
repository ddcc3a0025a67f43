"""Notebooks as runs: type-checked parameters, and a status that only the last cell writes.

papermill alone only warns of an unknown parameter, keeps `1e-5` from YAML as a string, and marks every cell completed
if the kernel was killed. Run headless with either of

    python -m rsft_lib.notebook notebooks/05_train.ipynb outputs/executed -p lr 2e-5
    papermill notebooks/05_train.ipynb outputs/executed/05_train.ipynb -p lr 2e-5

The exit code is 0 on success, and 75 (EX_TEMPFAIL of sysexits.h) if the run was stopped and can be resumed; papermill
exits with 1 in that case.
"""

import argparse
import ast
import difflib
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml
from IPython.display import display
from tqdm import tqdm

from rsft_lib.common.artifact import write_json
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.display.live.kernel_events import somebody_looks

STATUS = "application/vnd.rsft.status+json"
STATUS_FILE = "status.json"
KINDS = {"int": int, "float": float, "str": str, "bool": bool}


class Parameter(NamedTuple):
    """A declared parameter: the name of its type in KINDS, and its default."""

    kind: str
    default: Any


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


def project_root() -> Path:
    """The checkout that this library is part of.

    Raises:
        FileNotFoundError: the library is installed without one.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / "notebooks").is_dir():
        raise FileNotFoundError(
            f"the notebooks need a checkout of the project, but rsft_lib is installed in {root}: clone the project and "
            "run `pip install -e .` in it"
        )
    return root


def begin(namespace: dict, name: str, status: str = "") -> SimpleNamespace:
    """Check the parameters of a running notebook, print them with their origin, and return them.

    Call it in the cell after the parameters as `begin(globals(), "05_train")`. It removes the `status.json` of any
    earlier run. From here on relative paths start at the project root, wherever the notebook lies.

    Args:
        status: the parameter that names the folder passed to `finish`; `outputs/<name>` if empty.

    Raises:
        ValueError: parameters are unknown or have the wrong type; the message lists all of them.
    """
    os.chdir(project_root())
    declared = declared_parameters(project_root() / "notebooks" / f"{name}.ipynb")
    given = {name: namespace[name] for name in _injected(namespace.get("In", []))}
    given |= {name: namespace[name] for name in declared if namespace[name] != declared[name].default}
    values = {name: parameter.default for name, parameter in declared.items()} | checked(given, declared)
    (resolve(values[status] if status else f"outputs/{name}") / STATUS_FILE).unlink(missing_ok=True)
    width = max(map(len, values))
    for name, value in values.items():
        print(f"{name:<{width}}  {value!r}{'  (given)' if name in given else ''}")
    return SimpleNamespace(**values)


def finish(folder: str | Path, **facts) -> None:
    """Write `status.json` into `folder` to record that the notebook ran to its end. Call it in the last cell.

    Args:
        facts: results of the run. The headless runner prints `summary`, a string. A `status` of "stopped" marks a run
            that is not done, and `hint` explains how to resume it.

    Raises:
        Stopped: the run was stopped and is headless, so that the exit code is not 0.
    """
    path = resolve(folder) / STATUS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    status = {"status": "done", "finished": datetime.now(UTC).isoformat(timespec="seconds"), **facts}
    write_json(path, status)
    lines = [facts.get("summary", ""), facts.get("hint", ""), f"{status['status']}: {path}"]
    display({STATUS: status, "text/plain": "\n".join(filter(None, lines))}, raw=True)
    if status["status"] == "stopped" and not somebody_looks():
        raise Stopped(f"not done: {facts.get('hint', '')}")


def run(notebook: str | Path, folder: str | Path, parameters: dict) -> tuple[Path, dict]:
    """Execute a notebook with papermill.

    Returns:
        The path of the executed notebook in `folder`, and the facts passed to `finish`, whose `status` is "done" or
        "stopped".

    Raises:
        ValueError: a parameter is unknown or has the wrong type; nothing was run.
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
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # avoids a warning of the kernel
        )  # fmt: skip
    except PapermillExecutionError as error:
        if error.ename == RunStopped.__name__:
            return executed, {"status": "stopped", "hint": error.evalue}
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


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters declared in a notebook's tagged cell, one `name: type = default  # help` per line.

    Raises:
        ValueError: a line is something else.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return dict(map(_declared, ast.parse("\n".join(tagged)).body))


def _declared(line: ast.stmt) -> tuple[str, Parameter]:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as default):
            return name, Parameter(ast.unparse(kind), ast.literal_eval(default))
    raise ValueError(f"found {ast.unparse(line)!r} among the parameters, expected `name: type = default`")


def checked(given: dict, declared: dict[str, Parameter]) -> dict:
    """`given` with every value converted to its declared type.

    Raises:
        ValueError: names are unknown or values have the wrong type; the message has one line for each.
    """
    values, problems = {}, []
    for name, value in given.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(declared)}"
            problems.append(f"unknown parameter {name!r}; {hint}")
            continue
        try:
            values[name] = _as(declared[name].kind, value)
        except ValueError:
            problems.append(f"parameter {name} is {value!r} ({type(value).__name__}), expected {declared[name].kind}")
    if problems:
        raise ValueError("\n".join(problems))
    return values


def pairs(text: str) -> dict[str, str]:
    """Parse a parameter that maps strings to strings.

    >>> pairs("<|quad_start|> -> <short>, <|quad_end|> -> <long>")
    {'<|quad_start|>': '<short>', '<|quad_end|>': '<long>'}

    Raises:
        ValueError: a part is not of the form `this -> that`.
    """
    parts = [[side.strip() for side in part.split("->")] for part in text.split(",") if part.strip()]
    for pair in parts:
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"found {' -> '.join(pair)!r} in {text!r}, expected `this -> that`, comma-separated")
    return dict(parts)


def _as(kind: str, value):
    """`value` as the type `kind`; strings are parsed, since YAML reads 1e-5 as a string."""
    if kind == "bool" and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, KINDS[kind]) and not (kind == "int" and isinstance(value, bool)):
        return value
    if kind in ("int", "float") and isinstance(value, str):
        return KINDS[kind](value)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise ValueError


def _injected(executed_cells: list[str]) -> list[str]:
    """Names assigned in the cell that papermill injects, which begins with a fixed comment."""
    names = []
    for source in executed_cells:
        if source.startswith("# Parameters\n"):
            nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
            names += [node.id for node in nodes if isinstance(node.ctx, ast.Store)]
    return names


def _read_parameters(file: Path) -> dict:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} contains a {type(values).__name__}, expected lines of the form `name: value`")
    return values


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a notebook headless, with checked parameters.")
    parser.add_argument("notebook", help="notebook to run")
    parser.add_argument("folder", help="folder for the executed notebook")
    parser.add_argument("-f", "--file", type=Path, help="YAML file with parameters")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    arguments = parser.parse_args()
    try:
        from_file = _read_parameters(arguments.file) if arguments.file else {}
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
