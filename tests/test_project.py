"""What holds the project's files together: pytest tests/test_project.py"""

import ast
import re
import tomllib

import nbformat
import papermill
import pytest
import yaml
from packaging.requirements import Requirement

from rsft_lib.notebook import KINDS, declared_parameters
from rsft_lib.paths import ROOT

NOTEBOOKS = [
    "00_quickstart", "01_patch_tokenizer", "02_convert_checkpoint", "03_build_dataset",
    "04_tokenize_and_inspect", "05_train", "06_loss_curves", "07_export_and_generate", "08_loss_lab",
]  # fmt: skip
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {
    requirement.name: requirement
    for group in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][name] for name in ("te", "fast")))
    for requirement in map(Requirement, group)
}


def environment() -> tuple[list[str], list[str]]:
    """Dependencies of environment.yml: (conda's, pip's)."""
    *conda, last = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert isinstance(last, dict), "pip's section comes last"
    return conda, last["pip"]


def test_environment_and_pyproject_ask_for_the_same_versions():
    conda, pip = environment()
    stated = [Requirement(line) for line in conda + pip if not line.startswith(("-e", "python", "pip"))]
    assert {requirement.name: requirement for requirement in stated} == REQUIRED


def test_environment_has_a_python_that_pyproject_allows_and_installs_the_project_last():
    conda, pip = environment()
    (python,) = (line.removeprefix("python=") for line in conda if line.startswith("python="))
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(f"{python}.0")
    assert "pip" in conda and pip[-1] == "-e ."


def test_everything_that_shares_cuda_comes_from_pip():
    _, pip = environment()
    assert {"torch", "megatron-core", "transformer-engine"} <= {re.match(r"[\w-]+", line).group() for line in pip}


def test_torch_of_the_makefile_is_one_that_pyproject_allows():
    (version,) = re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert REQUIRED["torch"].specifier.contains(version)


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
            ast.parse(cell.source)  # a magic or a shell command is no Python
            assert not cell.outputs and cell.execution_count is None
            assert len(cell.source.splitlines()) <= 15 or "parameters" in cell.metadata.get("tags", []), cell.source


def test_a_notebook_says_what_it_takes_and_leads_to_the_next(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert len(cells) <= 25 and cells[0].source.startswith(f"# {notebook.stem[:2]} · ")
    assert re.search(r"^\| takes \| .*(second|minute)", cells[0].source, re.MULTILINE)
    assert re.search(r"[Dd]isk|\bMB\b|megabyte", cells[0].source)
    linked = re.findall(r"\]\((\w+)\.ipynb\)", "\n".join(cell.source for cell in cells))
    following = NOTEBOOKS[(NOTEBOOKS.index(notebook.stem) + 1) % len(NOTEBOOKS)]
    assert following in linked and set(linked) <= set(NOTEBOOKS)


def test_no_notebook_names_a_place_on_somebodys_machine_or_a_secret(notebook):
    text = "\n".join(cell.source for cell in nbformat.read(notebook, 4).cells)
    found = re.findall(r"/(?:home|root|Users)/\S*|\b[A-Z]:\\\S*|\bhf_\w{20,}", text)
    assert found == []
