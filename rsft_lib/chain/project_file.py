"""Project files: what the notebooks of one project share, set once; and where their outputs are.

    model: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B    # a name of SHARED
    long: traces.jsonl
    short: answers.jsonl
    seq_length: 16384
    05_train:                                           # any parameter of a notebook
      lr: 2.0e-5

`projects/NAME.yaml` is the project NAME; its outputs are in `outputs/NAME`. A project elsewhere is given by its path:
`FOLDER/project.yaml` or `FOLDER`, with outputs in `FOLDER`; or `PATH.yaml`, with outputs in `PATH`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from rsft_lib.chain.parameters import Parameter, checked, declared_parameters, read_yaml
from rsft_lib.common.paths import project_root, resolve

NOTEBOOKS = (
    "01_patch_tokenizer", "02_convert_checkpoint", "03_build_dataset", "04_tokenize_and_inspect", "05_train",
    "06_loss_curves", "07_export_and_generate", "08_loss_lab", "09_sweep", "10_make_pairs",
)  # fmt: skip
BUILD, TRAIN, SWEEP, PAIRS = "03_build_dataset", "05_train", "09_sweep", "10_make_pairs"
SHARED = {  # name -> the notebooks that take it from the project; later ones take it from these
    "model": ("01_patch_tokenizer", "10_make_pairs"),
    "long": ("03_build_dataset",), "short": ("03_build_dataset",), "hybrid": ("03_build_dataset",),
    "columns": ("03_build_dataset",),
    "dialect": ("01_patch_tokenizer", "03_build_dataset", "04_tokenize_and_inspect"),
    "seq_length": ("04_tokenize_and_inspect",),
    "nproc": ("05_train", "08_loss_lab", "10_make_pairs"),
}  # fmt: skip
MEMORY = {  # how notebook 05 saves GPU memory: of R1-Distill-Qwen-1.5B at 16,384 tokens, 52, 30 and 22 GiB are used
    "": {},
    "saving": {"recompute": "selective", "moments": "bf16"},
    "smallest": {"recompute": "full", "moments": "bf16", "gradients": "bf16"},
}


class ProjectError(ValueError):
    """A project or an input from it cannot be used. The message explains what to do; no traceback is shown."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True)
class Project:
    """A project: its file, the folder of its outputs, and for each notebook the parameters that the file sets."""

    name: str
    file: Path
    folder: Path
    parameters: dict[str, dict]


def notebook_file(notebook: str) -> Path:
    """The path of a notebook by its name, such as `05_train`."""
    return project_root() / "notebooks" / f"{notebook}.ipynb"


def notebook_number(notebook: str) -> int:
    """The place in NOTEBOOKS of a notebook by its name, or by how it begins, such as `05`.

    Raises:
        ValueError: there is no such notebook.
    """
    found = [number for number, name in enumerate(NOTEBOOKS) if name.startswith(notebook)]
    if len(found) != 1:
        raise ValueError(f"there is no notebook {notebook!r}; choose from {', '.join(NOTEBOOKS)}")
    return found[0]


def open_project(project: str | Path) -> Project:
    """Read and check the file of a project.

    Args:
        project: a name in `projects/`, or the path of a project file or of a folder with `project.yaml`.

    Raises:
        ProjectError: there is no such project, and the nearest name is suggested; or its file names something unknown,
            or a value has the wrong type, with one line for each.
    """
    place = locate(project)
    if not place.file.is_file():
        raise ProjectError(_unknown(str(project), place))
    try:
        return Project(place.name, place.file, place.folder, _checked(read_yaml(place.file), place.file))
    except ValueError as error:
        raise ProjectError(str(error)) from None


def locate(project: str | Path) -> Project:
    """Where a project is, whether or not its file exists; without parameters."""
    text, root = str(project), project_root()
    if not text:
        raise ValueError("project is empty; give a name in projects/, or a path")
    if "/" not in text and not text.endswith(".yaml"):
        return Project(text, root / "projects" / f"{text}.yaml", root / "outputs" / text, {})
    path = resolve(text)
    if path.suffix != ".yaml":
        return Project(path.name, path / "project.yaml", path, {})
    if path.name == "project.yaml":
        return Project(path.parent.name, path, path.parent, {})
    inside = path.parent.resolve() == root / "projects"
    return Project(path.stem, path, root / "outputs" / path.stem if inside else path.with_suffix(""), {})


def _unknown(project: str, place: Project) -> str:
    known = sorted(path.stem for path in (project_root() / "projects").glob("*.yaml"))
    near = difflib.get_close_matches(project, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}, or begin one (notebook 00)"
    return f"there is no project {project!r} ({place.file} does not exist); {hint}"


def _checked(content: dict, file: Path) -> dict[str, dict]:
    """Notebook -> its parameters in a project file: its section, over the shared names, over `memory`."""
    sections = {name: content.pop(name) or {} for name in NOTEBOOKS if name in content}
    declared = {name: declared_parameters(notebook_file(name)) for name in NOTEBOOKS}
    allowed = {name: declared[takers[0]][name] for name, takers in SHARED.items()} | {"memory": Parameter("str", "")}
    unknown = dict.fromkeys(NOTEBOOKS, Parameter("section", None))  # suggested for a misspelt name
    shared = checked(content, allowed | unknown, f"{file}: ")
    memory = shared.pop("memory", "")
    if memory not in MEMORY:
        raise ValueError(f"{file}: memory is {memory!r}; choose {', '.join(map(repr, MEMORY))}")
    found: dict[str, dict] = {name: {} for name in NOTEBOOKS} | {TRAIN: dict(MEMORY[memory])}
    for name, value in shared.items():
        for taker in SHARED[name]:
            found[taker][name] = value
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{file}: {name} is {section!r}, expected indented lines of the form `name: value`")
        found[name] |= checked(section, declared[name], f"{file}, {name}: ")
    return found
