"""What each notebook takes: given by hand, from the project file, or from what an earlier notebook recorded.

An earlier notebook must be done, and not stale: it ran with the parameters that it would have now, on inputs that have
not changed since.
"""

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.chain.project_file import BUILD, Project, ProjectError, notebook_file
from rsft_lib.chain.records import STATUS_FILE, identity
from rsft_lib.common.artifact import own_manifest
from rsft_lib.common.paths import resolve
from rsft_lib.training.run_folder import read_record

FROM = {  # notebook -> its parameter -> (the notebook that made it, what of its record)
    "02_convert_checkpoint": {
        "model": ("01_patch_tokenizer", "model"), "tokenizer": ("01_patch_tokenizer", "output"),
    },
    "03_build_dataset": {"tokenizer": ("01_patch_tokenizer", "output"), "hybrid": ("10_make_pairs", "pairs")},
    "04_tokenize_and_inspect": {
        "data": ("03_build_dataset", "output"), "tokenizer": ("01_patch_tokenizer", "output"),
    },
    "05_train": {
        "checkpoint": ("02_convert_checkpoint", "output"), "data": ("04_tokenize_and_inspect", "train"),
        "eval_data": ("04_tokenize_and_inspect", "heldout"),
    },
    "06_loss_curves": {"runs": ("05_train", "output")},
    "07_export_and_generate": {
        "run": ("05_train", "output"), "tokenizer": ("01_patch_tokenizer", "output"),
        "held_out": ("03_build_dataset", "heldout"),
    },
    "08_loss_lab": {
        "before": ("02_convert_checkpoint", "output"), "run": ("05_train", "output"),
        "data": ("04_tokenize_and_inspect", "train"),
    },
}  # fmt: skip
TOGETHER = {  # one of these given by hand, none of them is taken from elsewhere
    "02_convert_checkpoint": {"model", "tokenizer"},
    "03_build_dataset": {"long", "short", "hybrid", "columns"},
    "05_train": {"data", "eval_data"},
}
OUTPUTS = {  # the output in the folder of a notebook, by the project's name, where it is not the folder itself
    "01_patch_tokenizer": "{}_Hybrid", "02_convert_checkpoint": "{}_Megatron", "03_build_dataset": "dataset",
    "04_tokenize_and_inspect": "tokens", "07_export_and_generate": "{}",
}  # fmt: skip
GIVEN = "given"


class Value(NamedTuple):
    """A parameter's value, and where it comes from; empty for the notebook's default."""

    value: Any
    origin: str = ""


class State(NamedTuple):
    """Whether a notebook is done, stopped, stale or missing, why, and what it recorded."""

    kind: str
    why: str
    record: dict

    def made(self, fact: str) -> str:
        """What it recorded as made, such as `output`; empty if it made no such thing."""
        return str({**self.record["parameters"], **self.record}.get(fact, ""))


def folder_of(project: Project, notebook: str) -> Path:
    """The folder of a notebook in its project, with its `status.json`; `output`, if the project file sets it."""
    output = project.parameters[notebook].get("output", "")
    return resolve(output) if output and notebook not in OUTPUTS else project.folder / notebook


def taken(notebook: str, known: Collection[str]) -> dict[str, tuple[str, str]]:
    """The rows of FROM that hold for a notebook of which the parameters `known` are set otherwise."""
    answers = TOGETHER[BUILD] if notebook == BUILD else set()  # the project's own are not mixed with notebook 10's
    excluded = {*known} | (answers if answers & {*known} else set())
    return {name: row for name, row in FROM.get(notebook, {}).items() if name not in excluded}


class Chain:
    """The notebooks of a project as they are now; no state and no hash of an input is computed twice."""

    def __init__(self, project: Project):
        self.project = project
        self.state, self.identity = cache(self._state), cache(identity)

    def resolved(self, notebook: str, given: dict) -> dict[str, Value]:
        """The parameters of a notebook with their origins.

        Args:
            given: those given by hand, checked.

        Raises:
            ProjectError: an input that is not given is missing or stale.
        """
        project = self.project
        group = TOGETHER.get(notebook, set())
        by_hand = given.keys() | (group if group & given.keys() else set())
        declared = declared_parameters(notebook_file(notebook))
        values = {name: Value(parameter.default) for name, parameter in declared.items()}
        values |= {name: Value(value, f"project {project.name}")
                   for name, value in project.parameters[notebook].items() if name not in by_hand}  # fmt: skip
        values |= {name: Value(value, GIVEN) for name, value in given.items()}
        if values["output"] == Value(""):
            place = folder_of(project, notebook) / OUTPUTS.get(notebook, "").format(project.name)
            values["output"] = Value(str(place), f"project {project.name}")
        known = by_hand | {name for name, value in values.items() if value != Value("")}
        for name, (maker, fact) in taken(notebook, known).items():
            values[name] = Value(self._made(maker, fact, name), f"from {maker}")
        return values | _derived(project, notebook, values)

    def _made(self, maker: str, fact: str, name: str) -> str:
        """What a notebook recorded as made, for the parameter `name` of a later one; empty if it made no such thing."""
        found = self.state(maker)
        if found.kind == "missing":
            raise ProjectError(f"{name}: {found.why}: run notebook {maker} first, or give {name}")
        if found.kind != "done":
            raise ProjectError(found.why)
        return found.made(fact)

    def _state(self, notebook: str) -> State:
        """Whether a notebook ran to its end and its record still holds; `why` explains what to do if not."""
        record = read_record(folder_of(self.project, notebook) / STATUS_FILE)
        if "parameters" not in record:
            return State("missing", f"{notebook} has not run to its end in project {self.project.name}", record)
        again = f"run notebook {notebook} again"
        if record["status"] != "done":
            why = f"{notebook} was stopped in project {self.project.name}: {again} to resume"
            return State("stopped", why, record)
        before = record["parameters"]
        for made in (record.get("output", before["output"]), *record.get("folders", {}).values()):
            if not resolve(made).exists():
                return State("missing", f"{made}, made by {notebook}, does not exist", record)
        try:
            now = self.resolved(notebook, {name: before[name] for name in record["given"]})
        except ProjectError as error:
            return State("stale", str(error), record)
        for name, (value, _) in now.items():
            if name in before and before[name] != value and name != "project":
                why = f"{notebook} ran with {name} {before[name]!r}, which is now {value!r}"
                return State("stale", f"{why}: {again}", record)
        for name, recorded in record["inputs"].items():
            if self.identity(before[name]) not in (recorded, ""):  # a source may have been removed since
                return State("stale", f"{notebook} ran before {name} changed ({before[name]}): {again}", record)
        return State("done", "", record)


def state(project: Project, notebook: str) -> State:
    """The state of one notebook as it is now."""
    return Chain(project).state(notebook)


def _derived(project: Project, notebook: str, values: dict[str, Value]) -> dict[str, Value]:
    """Parameters that follow from others of the same notebook."""
    if notebook == "08_loss_lab" and values["filtered"] == Value(""):
        return {"filtered": Value(f"{values['output'].value}/filtered", "from output")}
    if notebook == "05_train" and not values["seq_length"].origin:
        options = own_manifest(resolve(values["data"].value)).get("options", {})
        length = options.get("max_length", 1) - 1 or project.parameters["04_tokenize_and_inspect"].get("seq_length")
        return {"seq_length": Value(length, "from data")} if length else {}
    if notebook != "04_tokenize_and_inspect":
        return {}
    longest, positions = values["max_length"], values["seq_length"]
    if not longest.value:
        return {"max_length": Value(positions.value + 1, "from seq_length")}
    return {} if positions.origin == GIVEN else {"seq_length": Value(longest.value - 1, "from max_length")}
