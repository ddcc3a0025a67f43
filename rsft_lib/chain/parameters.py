"""Parameters of notebooks: declared in the tagged cell, type-checked, and separated from what a user typed there."""

import ast
import difflib
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import yaml

KINDS = {"int": int, "float": float, "str": str, "bool": bool}


class Parameter(NamedTuple):
    """A declared parameter: the name of its type in KINDS, and its default."""

    kind: str
    default: Any


def declared_parameters(notebook: Path) -> dict[str, Parameter]:
    """The parameters declared in a notebook's tagged cell, one `name: type = default  # help` per line.

    Raises:
        ValueError: a line is something else.
    """
    return _parameters(notebook.read_text(encoding="utf-8"))


def committed_parameters(notebook: Path) -> dict[str, Parameter]:
    """The same of the notebook as last committed; where there is no git, as it is.

    JupyterLab saves what a user types into the cell, and that is given by hand, not a default.
    """
    command = ["git", "-C", str(notebook.parent), "show", f"HEAD:./{notebook.name}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=True, encoding="utf-8", timeout=60)
    except (OSError, subprocess.SubprocessError):
        return declared_parameters(notebook)
    return _parameters(shown.stdout)


def _parameters(text: str) -> dict[str, Parameter]:
    cells = json.loads(text)["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    return dict(map(_declared, ast.parse("\n".join(tagged)).body))


def _declared(line: ast.stmt) -> tuple[str, Parameter]:
    match line:
        case ast.AnnAssign(target=ast.Name(id=name), annotation=kind, value=ast.expr() as default):
            return name, Parameter(ast.unparse(kind), ast.literal_eval(default))
    raise ValueError(f"found {ast.unparse(line)!r} among the parameters, expected `name: type = default`")


def checked(given: dict, declared: dict[str, Parameter], place: str = "") -> dict:
    """`given` with every value converted to its declared type.

    Args:
        place: begins each line of the message, e.g. the name of the file.

    Raises:
        ValueError: names are unknown or values have the wrong type; the message has one line for each.
    """
    values, problems = {}, []
    for name, value in given.items():
        if name not in declared:
            problems.append(f"{place}unknown parameter {name!r}; {_hint(name, declared)}")
            continue
        try:
            values[name] = _as(declared[name].kind, value)
        except ValueError:
            kind = declared[name].kind
            problems.append(f"{place}parameter {name} is {value!r} ({type(value).__name__}), expected {kind}")
    if problems:
        raise ValueError("\n".join(problems))
    return values


def _hint(name: str, declared: dict[str, Parameter]) -> str:
    near = difflib.get_close_matches(str(name), declared, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(declared)}"


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


def read_yaml(file: Path) -> dict:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is not YAML, or contains something else.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} contains a {type(values).__name__}, expected lines of the form `name: value`")
    return values
