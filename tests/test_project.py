"""Requirements, constraints, imports and notebooks agree with each other."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement
from support import ROOT

from rsft_lib.chain.parameters import KINDS, declared_parameters
from rsft_lib.chain.project_file import NOTEBOOKS as CHAIN

NOTEBOOKS = [
    "00_quickstart", "01_patch_tokenizer", "02_convert_checkpoint", "03_build_dataset",
    "04_tokenize_and_inspect", "05_train", "06_loss_curves", "07_export_and_generate", "08_loss_lab", "09_sweep",
    "10_make_pairs",
]  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
FOLDERS = [
    "common", "tokenizer", "data", "model", "checkpoint", "generation", "training", "launch", "evaluation", "display",
    "chain",
]  # fmt: skip


def on(python: str, lines: list[str]) -> list[Requirement]:
    """The requirements among `lines` that hold for a Python on Linux."""
    system = {"python_version": python, "sys_platform": "linux", "platform_system": "Linux"}
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate(system)]


def test_environment_has_a_python_that_pyproject_allows_and_installs_the_project_within_the_constraints():
    python, pip, last = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(f"{python.removeprefix('python=')}.0")
    assert pip == "pip" and last == {"pip": ["-c constraints.txt", "-e .[fast]"]}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_name_one_version_that_pyproject_allows_of_all_it_asks_for(python):
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(f"{python}.0")
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = on(python, [line for line in text.splitlines() if line and not line.startswith("#")])
    versions = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in tested}
    assert len(versions) == len(tested)
    for wanted in on(python, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["fast"]):
        assert wanted.specifier.contains(versions[wanted.name]), wanted


def imported(path: Path) -> set[str]:
    """The folders and modules right under rsft_lib that a module imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if names == ["rsft_lib"]:
            names = [f"rsft_lib.{name.name}" for name in node.names]
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rsft_lib.")}
    return found


def test_a_folder_imports_only_from_those_before_it():
    library = ROOT / "rsft_lib"
    assert {path.name for path in library.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    assert {path.stem for path in library.glob("*.py")} == {"__init__", "notebook", "project", "demo"}
    for number, folder in enumerate(FOLDERS):
        for path in (library / folder).rglob("*.py"):
            assert imported(path) <= set(FOLDERS[: number + 1]), path


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_uses_only_what_the_library_has(script):
    """Their functions run on GPUs, where no test does."""
    tree, modules = ast.parse(script.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rsft_lib":
            for name in node.names:
                if is_package(node.module) and importlib.util.find_spec(f"{node.module}.{name.name}"):
                    modules[name.asname or name.name] = importlib.import_module(f"{node.module}.{name.name}")
                else:
                    assert hasattr(importlib.import_module(node.module), name.name), f"{node.module}.{name.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def is_package(module: str) -> bool:
    return hasattr(importlib.import_module(module), "__path__")


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return ROOT / "notebooks" / f"{request.param}.ipynb"


def code(notebook) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]


def calls(source: str) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def test_notebooks_are_those_of_the_readme():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in NOTEBOOKS if name not in readme] == []


def test_papermill_sees_every_parameter_with_its_type_and_help(notebook):
    tagged = [cell for cell in nbformat.read(notebook, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and tagged[0].source == code(notebook)[0]
    declared, seen = declared_parameters(notebook), papermill.inspect_notebook(str(notebook))
    assert {name: parameter.kind for name, parameter in declared.items()} == {
        name: parameter["inferred_type_name"] for name, parameter in seen.items()
    }
    assert [name for name, parameter in seen.items() if not parameter["help"]] == []


def test_every_notebook_of_the_chain_begins_with_its_project(notebook):
    first, (kind, default) = next(iter(declared_parameters(notebook).items()))
    assert (first, kind, default) == ("project", "str", "tiny") or notebook.stem == NOTEBOOKS[0]
    assert (notebook.stem in CHAIN) == (notebook.stem != NOTEBOOKS[0])


def test_every_default_has_its_declared_type(notebook):
    for name, (kind, default) in declared_parameters(notebook).items():
        assert type(default) is KINDS[kind], name


def test_parameters_are_checked_first_and_the_end_is_reported_last(notebook):
    cells = code(notebook)
    assert f"notebook.begin(globals(), '{notebook.stem}'" in ast.unparse(ast.parse(cells[1]))
    assert "notebook.finish" in calls(cells[-1])
    assert not any("notebook.finish" in calls(cell) for cell in cells[:-1])


def test_cells_are_short_python_without_outputs(notebook):
    book = nbformat.read(notebook, 4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    for cell in book.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)  # a magic or a shell command is not Python
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 15 or "parameters" in cell.metadata.get("tags", []), cell.source


@pytest.mark.parametrize(
    "name", ["03_build_dataset", "04_tokenize_and_inspect", "06_loss_curves", "08_loss_lab", "09_sweep"]
)
def test_a_notebook_that_only_reads_files_or_starts_processes_does_not_wait_for_torch(name):
    nodes = [node for source in code(ROOT / "notebooks" / f"{name}.ipynb") for node in ast.parse(source).body]
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    source = "\n".join([*imports, "import sys", "print('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


def test_a_notebook_says_what_it_takes_and_leads_to_the_next(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert len(cells) <= 25 and cells[0].source.startswith(f"# {notebook.stem[:2]} · ")
    assert re.search(r"^\| Time and disk \| .*(second|minute)", cells[0].source, re.MULTILINE)
    assert re.search(r"[Dd]isk|\bMB\b|megabyte", cells[0].source)
    linked = re.findall(r"\]\((\w+)\.ipynb\)", "\n".join(cell.source for cell in cells))
    following = NOTEBOOKS[(NOTEBOOKS.index(notebook.stem) + 1) % len(NOTEBOOKS)]
    assert following in linked and set(linked) <= set(NOTEBOOKS)


def test_no_notebook_names_a_place_on_somebodys_machine_or_a_secret(notebook):
    text = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells)
    found = re.findall(r"/(?:home|root|Users)/\S*|\b[A-Z]:\\\S*|\bhf_\w{20,}", text)
    assert found == []
