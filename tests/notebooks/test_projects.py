"""Project files, where a notebook's parameters come from, and the errors for an input that is missing or stale."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from browser import copy_project, set_defaults
from support import ROOT, random_store

from rsft_lib import demo, notebook, project
from rsft_lib.chain import records, steps
from rsft_lib.chain.parameters import committed_parameters, declared_parameters
from rsft_lib.chain.project_file import NOTEBOOKS, ProjectError, notebook_file, open_project
from rsft_lib.chain.report import TAG, write_report
from rsft_lib.chain.steps import FROM, state
from rsft_lib.chain.sweep import plan
from rsft_lib.common.artifact import new_folder

OWN_FOLDER = (
    "05_train",
    "06_loss_curves",
    "08_loss_lab",
    "09_sweep",
    "10_make_pairs",
)  # their status is in their output


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The file of a project with a model and answers."""
    monkeypatch.chdir(tmp_path)
    demo.make_sources(tmp_path / "answers", 5, seed=1)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"max_position_embeddings": 1024}')
    return project.new("mine.yaml", "model", "answers/long.jsonl", "answers/short.jsonl")


def begin(file, name: str, **given):
    declared = declared_parameters(notebook_file(name))
    namespace = {key: parameter.default for key, parameter in declared.items()} | {"project": str(file)} | given
    return notebook.begin(namespace, name, status="output" if name in OWN_FOLDER else "")


def ran(file, name: str, content: str = "", **given) -> Path:
    """Run a notebook in name only: it makes one folder, or one per split."""
    p = begin(file, name, **given)
    made, facts = [Path(p.output)], {}
    if name.startswith("04"):
        made = [Path(p.output) / split for split in ("train", "heldout")]
        facts = {"folders": {path.name: str(path) for path in made}} | {path.name: str(path) for path in made}
    for folder in made:
        options = {"options": {"max_length": getattr(p, "max_length", 0)}, "content": content}
        with new_folder(folder, {"made_by": name, **options}, overwrite=True):
            pass
    notebook.finish(p, **facts)
    return p.folder


def ran_until(file, last: str) -> None:
    for name in NOTEBOOKS[: NOTEBOOKS.index(last) + 1]:
        ran(file, name)


def origins(capsys) -> dict[str, tuple[str, str]]:
    """Parameter -> (value, origin) as printed last."""
    lines = [re.match(r"(\w+) +(\S.*?)(?:  \((.*)\))?$", line) for line in capsys.readouterr().out.splitlines()]
    return {line[1]: (line[2], line[3] or "") for line in lines if line}


def test_each_value_is_shown_with_its_origin_and_one_given_by_hand_wins(mine, capsys):
    ran_until(mine, "04_tokenize_and_inspect")
    mine.write_text(mine.read_text() + "  lr: 1e-3\n  min_lr: 1e-4\n")
    capsys.readouterr()
    p = begin(mine, "05_train", lr=2e-3)
    shown, outputs = origins(capsys), mine.with_suffix("")
    assert p.lr == 2e-3 and shown["lr"] == ("0.002", "given")
    assert p.min_lr == 1e-4 and shown["min_lr"] == ("0.0001", "project mine")
    assert p.checkpoint == str(outputs / "02_convert_checkpoint" / "mine_Megatron")
    assert shown["checkpoint"][1] == "from 02_convert_checkpoint"
    assert p.eval_data == str(outputs / "04_tokenize_and_inspect" / "tokens" / "heldout")
    assert p.seq_length == 1024 and shown["seq_length"][1] == "from data"
    assert p.output == str(outputs / "05_train") and p.epochs == 3.0 and shown["weight_decay"] == ("0.1", "")


def test_a_held_out_set_in_the_project_file_leaves_the_training_data_to_notebook_04(mine, tmp_path):
    ran_until(mine, "04_tokenize_and_inspect")
    mine.write_text(mine.read_text() + f"\n05_train: {{eval_data: {tmp_path}}}\n")
    p = begin(mine, "05_train")
    assert p.data.endswith("train") and p.eval_data == str(tmp_path)


def test_lengths_follow_from_one_another(mine):
    ran_until(mine, "03_build_dataset")
    given = ({}, {"max_length": 300}, {"seq_length": 500}, {"max_length": 300, "seq_length": 500})
    found = [begin(mine, "04_tokenize_and_inspect", **values) for values in given]
    assert [(p.max_length, p.seq_length) for p in found] == [(1025, 1024), (300, 299), (501, 500), (300, 500)]


def test_every_parameter_that_an_earlier_notebook_makes_is_taken_from_it(mine):
    ran_until(mine, NOTEBOOKS[-1])
    for name in NOTEBOOKS:
        found = state(open_project(mine), name)
        assert found.kind == "done" and set(FROM.get(name, {})) <= set(found.record["parameters"])
        empty = [key for key in FROM.get(name, {}) if not found.record["parameters"][key]]
        # `ran` splits no dataset, and a project with answers takes none from notebook 10
        assert empty == {"03": ["hybrid"], "07": ["held_out"]}.get(name[:2], [])


@pytest.fixture
def asking(mine, tmp_path) -> Path:
    """The file of a project with questions in place of answers."""
    return project.new("asking.yaml", "model", questions="answers/long.jsonl")


def test_a_project_with_questions_only_trains_on_the_pairs_that_notebook_10_makes(asking, mine, tmp_path):
    ran_until(asking, "02_convert_checkpoint")
    with pytest.raises(
        ProjectError, match="^hybrid: 10_make_pairs has not run to its end in project asking: run noteb"
    ):
        begin(asking, "03_build_dataset")
    p = begin(asking, "10_make_pairs")
    assert (p.questions, p.model) == (str(tmp_path / "answers/long.jsonl"), str(tmp_path / "model"))
    notebook.finish(p, pairs=f"{p.output}/pairs/pairs.jsonl")
    p = begin(asking, "03_build_dataset")
    assert p.hybrid == f"{asking.with_suffix('')}/10_make_pairs/pairs/pairs.jsonl" and not p.long
    assert begin(asking, "03_build_dataset", long="l").hybrid == ""
    ran(asking, "03_build_dataset")
    (trial,) = plan(str(asking), "03_build_dataset.seed: 5", tmp_path / "trials")
    assert begin(trial.project.file, "03_build_dataset").hybrid == p.hybrid
    demo.make_sources(tmp_path / "answers", 6, seed=2)
    with pytest.raises(ProjectError, match="^10_make_pairs ran before questions changed"):
        begin(asking, "03_build_dataset")


def test_a_run_makes_pairs_before_they_are_needed_and_sweeps_only_when_asked(asking, mine):
    def numbers(file, *ends):
        return [name[:2] for name in project._to_run(open_project(file), *ends)]

    assert numbers(mine, "01", "08") == ["01", "02", "03", "04", "05", "06", "07", "08"]
    assert numbers(mine, "07", "09") == ["07", "08", "09"] and numbers(mine, "08", "10") == ["08", "10"]
    assert numbers(asking, "02", "04") == ["02", "10", "03", "04"] and numbers(asking, "10", "10") == ["10"]
    assert numbers(asking, "01", "10") == ["01", "02", "10", "03", "04", "05", "06", "07", "08"]


def test_a_changed_evaluation_set_makes_the_pairs_stale(asking, tmp_path):
    names = [str(tmp_path / f"{number}.jsonl") for number in (1, 2)]
    for name in names:
        Path(name).write_text("{}\n")
    p = begin(asking, "10_make_pairs", evaluation=", ".join(names))
    p.folder.mkdir(parents=True)
    notebook.finish(p)
    assert state(open_project(asking), "10_make_pairs").kind == "done"
    Path(names[1]).write_text("{}\n{}\n")
    assert state(open_project(asking), "10_make_pairs").why.startswith("10_make_pairs ran before evaluation changed")


def test_a_wrong_name_is_one_line_with_the_nearest_name_and_replaces_nothing(mine, tmp_path):
    for name in ("r1-1.5", "tiny2", str(tmp_path / "mien.yaml")):
        with pytest.raises(ProjectError) as error:
            begin(name, "01_patch_tokenizer")
        assert re.fullmatch(f"there is no project {name!r} .*; (did you mean r1-1.5b.|did you mean tiny.|choose .*)",
                            str(error.value))  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "mine.yaml", "model"]


def test_a_missing_notebook_is_named_in_one_line(mine):
    with pytest.raises(ProjectError) as error:
        begin(mine, "05_train")
    assert str(error.value) == (
        "checkpoint: 02_convert_checkpoint has not run to its end in project mine: run notebook 02_convert_checkpoint "
        "first, or give checkpoint"
    )
    p = begin(mine, "05_train", checkpoint="c", data="d")  # paths given by hand need no notebook
    assert (p.checkpoint, p.data, p.eval_data) == ("c", "d", "")


def test_a_changed_tokenizer_makes_what_was_made_with_it_stale(mine):
    ran_until(mine, "05_train")
    ran(mine, "01_patch_tokenizer")
    begin(mine, "07_export_and_generate", held_out="h")  # the same again
    ran(mine, "01_patch_tokenizer", content="other")
    with pytest.raises(ProjectError) as error:
        begin(mine, "07_export_and_generate", held_out="h")
    tokenizer = mine.with_suffix("") / "01_patch_tokenizer" / "mine_Hybrid"
    assert str(error.value) == (
        f"02_convert_checkpoint ran before tokenizer changed ({tokenizer}): run notebook 02_convert_checkpoint again"
    )
    kinds = {name: state(open_project(mine), name).kind for name in NOTEBOOKS[:5]}
    assert list(kinds.values()) == ["done", "stale", "stale", "stale", "stale"]


def test_changed_answers_and_a_changed_project_file_make_stale_what_they_shaped(mine, tmp_path):
    ran_until(mine, "04_tokenize_and_inspect")
    given = mine.read_text()
    mine.write_text(given.replace("seq_length: 1024", "seq_length: 512"))
    with pytest.raises(ProjectError, match="^04_tokenize_and_inspect ran with max_length 1025, which is now 513: run"):
        begin(mine, "05_train")
    mine.write_text(given)
    begin(mine, "05_train")
    demo.make_sources(tmp_path / "answers", 6, seed=2)
    with pytest.raises(ProjectError, match=r"^03_build_dataset ran before long changed \(.*long.jsonl\): run"):
        begin(mine, "05_train")


def test_the_status_of_a_project_hashes_each_file_and_reads_each_record_once(mine, monkeypatch):
    ran_until(mine, NOTEBOOKS[-1])
    hashed, read = Mock(wraps=records.file_hash), Mock(wraps=steps.read_record)
    monkeypatch.setattr(records, "file_hash", hashed)
    monkeypatch.setattr(steps, "read_record", read)
    assert "stale" not in repr(project.status(open_project(mine)))
    opened = Counter(str(call.args[0]) for call in hashed.call_args_list + read.call_args_list)
    assert {Path(file).name for file in opened} >= {"long.jsonl", "manifest.json", "status.json"}
    assert {file: count for file, count in opened.items() if count > 1} == {}


def test_a_value_given_by_hand_is_kept_as_the_choice_for_this_project(mine):
    ran_until(mine, "03_build_dataset")
    ran(mine, "04_tokenize_and_inspect", max_length=300)
    assert begin(mine, "05_train", checkpoint="c").seq_length == 299
    assert "given by hand: max_length" in repr(project.status(open_project(mine)))


def test_a_stopped_training_is_no_input(mine):
    ran_until(mine, "04_tokenize_and_inspect")
    p = begin(mine, "05_train")
    p.folder.mkdir()
    record = {"status": "stopped", **p.record}
    (p.folder / "status.json").write_text(json.dumps(record))
    with pytest.raises(ProjectError, match="^05_train was stopped in project mine: run notebook 05_train again"):
        begin(mine, "06_loss_curves")


def test_an_output_given_by_hand_is_not_part_of_the_project(mine, tmp_path):
    ran(mine, "01_patch_tokenizer", output=str(tmp_path / "elsewhere"))
    assert state(open_project(mine), "01_patch_tokenizer").kind == "missing"
    assert (ROOT / "outputs" / "01_patch_tokenizer" / "status.json").exists()
    folder = ran(mine, "05_train", checkpoint="c", data="d", output=str(tmp_path / "run"))
    assert folder == tmp_path / "run" and state(open_project(mine), "05_train").kind == "missing"


def test_an_output_of_the_project_file_is_part_of_it(mine, tmp_path):
    ran_until(mine, "04_tokenize_and_inspect")
    mine.write_text(mine.read_text() + f"  output: {tmp_path}/scratch\n")
    assert ran(mine, "05_train") == tmp_path / "scratch"
    assert begin(mine, "06_loss_curves").runs == str(tmp_path / "scratch")


def test_a_trial_of_a_sweep_takes_what_notebooks_before_it_made_in_the_project(mine, tmp_path):
    ran_until(mine, "04_tokenize_and_inspect")
    base, names = begin(mine, "05_train"), ("checkpoint", "data", "eval_data")
    mine.write_text(mine.read_text() + f"  output: {tmp_path}/scratch\n")  # no place for several runs
    (trial,) = plan(str(mine), "lr: 2e-3", tmp_path / "trials")
    p = begin(trial.project.file, "05_train")
    assert trial.notebooks == ("05_train",) and p.lr == 2e-3 and p.epochs == base.epochs
    assert p.output == str(tmp_path / "trials" / "lr=0.002" / "05_train")
    assert [getattr(p, name) for name in names] == [getattr(base, name) for name in names]
    (trial,) = plan(str(mine), "03_build_dataset.seed: 5", tmp_path / "trials")
    assert trial.notebooks == ("03_build_dataset", "04_tokenize_and_inspect", "05_train")
    for name in trial.notebooks[:2]:
        assert ran(trial.project.file, name).parent == trial.project.folder
    p = begin(trial.project.file, "05_train")
    assert p.checkpoint == base.checkpoint and Path(p.data).is_relative_to(trial.project.folder)
    assert state(trial.project, "03_build_dataset").record["parameters"]["seed"] == 5
    ran(mine, "01_patch_tokenizer", content="other")
    assert state(trial.project, "03_build_dataset").kind == "stale"
    with pytest.raises(ProjectError, match="02_convert_checkpoint ran before tokenizer changed.*; a sweep takes its"):
        plan(str(mine), "lr: 2e-3", tmp_path / "trials")


def test_answers_given_by_hand_are_not_mixed_with_those_of_the_project(mine):
    ran(mine, "01_patch_tokenizer")
    p = begin(mine, "03_build_dataset", long="other.jsonl")
    assert (p.long, p.short, p.hybrid) == ("other.jsonl", "", "")


def test_the_sequence_length_of_tokens_without_one_is_the_projects(mine, tmp_path):
    store = random_store(tmp_path / "store")
    assert begin(mine, "05_train", checkpoint="c", data=str(store)).seq_length == 1024


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown parameter 'modle'; did you mean model?"),
        ("05_trian:\n  lr: 1", "unknown parameter '05_trian'; did you mean 05_train?"),
        ("05_train:\n  lrr: 1", "05_train: unknown parameter 'lrr'; did you mean lr?"),
        ("05_train:\n  lr: fast", "05_train: parameter lr is 'fast' (str), expected float"),
        ("05_train: 3", "05_train is 3, expected indented lines"),
        ("seq_length: long", "parameter seq_length is 'long' (str), expected int"),
        ("memory: none", "memory is 'none'; choose '', 'saving', 'smallest'"),
        ("- model", "contains a list, expected lines"),
        ("output: x", "unknown parameter 'output'"),
    ],
)
def test_a_faulty_project_file_is_named_with_its_fault(tmp_path, text, message):
    file = tmp_path / "faulty.yaml"
    file.write_text(text)
    with pytest.raises(ProjectError) as error:
        open_project(file)
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


def test_a_project_is_named_or_lies_anywhere(tmp_path):
    for name in ("tiny", "projects/tiny.yaml", str(ROOT / "projects" / "tiny.yaml")):
        found = open_project(name if name != "projects/tiny.yaml" else ROOT / name)
        assert (found.name, found.folder) == ("tiny", ROOT / "outputs" / "tiny")
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "project.yaml").write_text("model: m\n")
    for given in (tmp_path / "sums", tmp_path / "sums" / "project.yaml"):
        assert (open_project(given).name, open_project(given).folder) == ("sums", tmp_path / "sums")


@pytest.mark.parametrize(("gpus", "layout"), [(4, "auto"), (0, None)])
def test_a_new_project_takes_all_gpus_in_the_best_layout(mine, tmp_path, monkeypatch, gpus, layout):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    file = project.new(str(tmp_path / "on_gpus.yaml"), "model", "answers/long.jsonl")
    training = open_project(file).parameters["05_train"]
    assert training.get("layout") == layout and (training["nproc"] == gpus or not gpus)


def test_a_new_project_is_refused_where_one_is_or_its_inputs_are_not(mine, tmp_path):
    with pytest.raises(FileExistsError, match=f"{mine} exists: edit it, or choose another name"):
        project.new(str(mine), "model", "answers/long.jsonl")
    for given, message in (
        (("./none", "answers/long.jsonl"), "folder of the model: .*none does not exist"),
        (("model", "none.jsonl"), "none.jsonl"),
        (("model",), "there is no data"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            project.new("new.yaml", *given)
    assert not (tmp_path / "new.yaml").exists()


def test_what_a_user_saves_in_the_parameters_cell_is_given_by_hand(tmp_path):
    copy = copy_project(tmp_path)
    set_defaults(copy / "notebooks" / "05_train.ipynb", lr=0.5)
    code = """
from rsft_lib import notebook
from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.chain.project_file import notebook_file
namespace = {name: one.default for name, one in declared_parameters(notebook_file("05_train")).items()}
p = notebook.begin(namespace | {"checkpoint": "c", "data": "d"}, "05_train", status="output")
print(p.lr, p.record["given"])
"""
    done = python(copy, "-c", code)
    assert "0.5 ['checkpoint', 'data', 'lr']" in done.stdout, done.stderr
    (copy / ".git").rename(copy / "git")
    edited = copy / "notebooks" / "05_train.ipynb"
    assert committed_parameters(edited)["lr"].default == 0.5, "without git, the notebook as it is"


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python in a copy of the project, with its library."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=os.environ | {"PYTHONPATH": str(copy)}, capture_output=True, text=True)


def test_the_report_shows_tagged_cells_below_their_headings_and_escapes_text(mine, tmp_path):
    for name in NOTEBOOKS:
        book = nbformat.read(notebook_file(name), 4)
        for cell in book.cells:
            if TAG in cell.metadata.get("tags", []):
                html = nbformat.v4.new_output("display_data", {"text/html": f"<b>of {cell.id}</b>"})
                text = nbformat.v4.new_output("stream", text="<script>")
                cell.outputs = [html, text]
        (tmp_path / "executed").mkdir(exist_ok=True)
        nbformat.write(book, tmp_path / "executed" / f"{name}.ipynb")
    page = write_report(open_project(mine), "<i>states</i>", tmp_path / "executed").read_text()
    headings = re.findall(r"<h3>(.+?)</h3>", page)
    assert {"Verify", "The loss mask", "Environment", "Did it learn?", "Loss", "Where the loss is"} <= set(headings)
    assert page.count("<b>of ") > 10 and "<i>states</i>" in page and "seq_length: 1024" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
