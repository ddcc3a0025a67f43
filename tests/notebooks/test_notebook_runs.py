"""Notebooks as runs, with real kernels and the real papermill."""

import json
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from chain import outputs
from jupyter_client.provisioning import local_provisioner

from rsft_lib.chain.parameters import Parameter, checked, declared_parameters
from rsft_lib.notebook import pairs, run

DECLARED = {
    "lr": Parameter("float", 1e-3),
    "steps": Parameter("int", 5),
    "flag": Parameter("bool", False),
    "name": Parameter("str", "x"),
}
PARAMETERS = "\n".join(f"{name}: {kind} = {default!r}  # help" for name, (kind, default) in DECLARED.items())


def write_notebook(folder, *cells, last="notebook.finish(p, steps=p.steps, summary='all is well')"):
    """A notebook with the parameters above, `begin`, `cells`, and the cell that calls `finish`."""
    path = folder / "small.ipynb"
    # An absolute path, so that `begin` reads this notebook and not one of the project; its status goes to folder/small.
    begin = f"from rsft_lib import notebook\n\np = notebook.begin(globals(), {str(path.with_suffix(''))!r})"
    code = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, begin, *cells, last)]
    code[0].metadata.tags = ["parameters"]
    book = nbformat.v4.new_notebook(cells=code)
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


def papermill(notebook, *arguments):
    command = [sys.executable, "-m", "papermill", str(notebook), str(notebook.with_name("executed.ipynb"))]
    return subprocess.run(
        [*command, "--no-progress-bar", *arguments], cwd=notebook.parent, capture_output=True, text=True, timeout=300
    )


def strict(*arguments):
    command = [sys.executable, "-m", "rsft_lib.notebook", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("lr", "1e-5", 1e-5), ("lr", 1, 1.0), ("lr", 2e-3, 2e-3), ("steps", "7", 7), ("steps", 7, 7),
        ("flag", "true", True), ("flag", "False", False), ("flag", True, True), ("name", "1e-5", "1e-5"),
    ],
)  # fmt: skip
def test_a_value_is_converted_to_the_declared_type(name, given, value):
    converted = checked({name: given}, DECLARED)[name]
    assert converted == value and type(converted) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("steps", 1.5, "int"), ("steps", "1.5", "int"), ("steps", True, "int"), ("lr", "abc", "float"),
        ("lr", True, "float"), ("lr", None, "float"), ("flag", "yes", "bool"), ("flag", 1, "bool"), ("name", 3, "str"),
    ],
)  # fmt: skip
def test_the_error_for_a_wrong_type_has_name_value_and_type(name, given, kind):
    with pytest.raises(ValueError) as error:
        checked({name: given}, DECLARED)
    assert all(part in str(error.value) for part in (name, repr(given), kind))


def test_one_error_lists_all_problems_and_suggests_the_nearest_name():
    with pytest.raises(ValueError) as error:
        checked({"lrr": 1, "steps": "many"}, DECLARED)
    assert "'lrr'" in str(error.value) and "did you mean lr?" in str(error.value) and "'many'" in str(error.value)


def test_an_invalid_parameter_is_rejected_before_anything_runs(tmp_path):
    notebook = write_notebook(tmp_path)
    with pytest.raises(ValueError, match="stepz"):
        run(notebook, tmp_path / "executed", {"stepz": 3})
    assert not (tmp_path / "executed").exists()


def test_declared_parameters_are_read_from_the_tagged_cell(tmp_path):
    assert declared_parameters(write_notebook(tmp_path)) == DECLARED


def test_plain_papermill_uses_the_declared_types(tmp_path):
    check = "assert (p.lr, p.steps, p.flag) == (1e-5, 7, True), p\nassert type(p.lr) is float"
    done = papermill(write_notebook(tmp_path, check), "-y", "lr: 1e-5", "-p", "steps", "7", "-p", "flag", "true")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "status.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "lrr", "1"), "did you mean lr?"),
        (("-p", "steps", "1.5"), "parameter steps is 1.5 (float), expected int"),
    ],
)
def test_plain_papermill_fails_on_an_invalid_parameter(tmp_path, arguments, message):
    done = papermill(write_notebook(tmp_path), *arguments)
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "small").exists()


def test_begin_can_run_again_after_later_cells_made_variables(tmp_path):
    again = f"result = 3\np = notebook.begin(globals(), {str(tmp_path / 'small')!r})\nassert p.steps == 9"
    executed, status = run(write_notebook(tmp_path, again), tmp_path / "executed", {"steps": 9})
    assert status["steps"] == 9


def test_given_parameters_are_marked_and_defaults_are_not(tmp_path):
    executed, _ = run(write_notebook(tmp_path), tmp_path / "executed", {"steps": 9})
    data = next(output["data"] for output in outputs(executed) if "text/html" in output.get("data", {}))
    steps, lr = (re.search(rf"^{name} .*$", data["text/plain"], re.MULTILINE)[0] for name in ("steps", "lr"))
    assert "9" in steps and "given" in steps and "given" not in lr
    changed, folded = data["text/html"].split("<details>")
    assert "steps" in changed and "steps" not in folded and "lr" in folded and "lr" not in changed


def test_a_progress_bar_in_a_notebook_is_one_output_that_ends_at_100_percent(tmp_path):
    slow = "import time\nfrom rsft_lib.common import progress\nprogress.DELAY = 1e-9\n"
    slow += "with progress.progress('read', 'B', 9) as bar:\n"
    slow += "    for _ in range(4):\n        bar.update(2)\n        bar.refresh()"
    executed, _ = run(write_notebook(tmp_path, slow), tmp_path / "executed", {})
    shown = outputs(executed)
    assert "\r" not in "".join(output.get("text", "") for output in shown)
    (bar,) = [text for output in shown if "read:" in (text := output.get("data", {}).get("text/plain", ""))]
    assert bar.startswith("read: 100%") and "9.00/9.00" in bar


STOPPED = "notebook.finish(p, status='stopped', hint='run again', summary='half of it')"


def test_a_stopped_run_has_a_nonzero_exit_code_with_either_command(tmp_path):
    notebook = write_notebook(tmp_path, last=STOPPED)
    plain, ours = papermill(notebook), strict(notebook, tmp_path / "executed")
    assert plain.returncode == 1 and "\nnot done: run again" in plain.stderr
    assert ours.returncode == 75 and ours.stderr.endswith("not done: run again\n") and "half of it" in ours.stdout
    assert '"status": "stopped"' in (tmp_path / "small" / "status.json").read_text()
    for executed in (tmp_path / "executed.ipynb", tmp_path / "executed" / "small.ipynb"):
        last = nbformat.read(executed, 4).cells[-1].outputs
        assert [output.output_type for output in last] == ["display_data", "error"]
        assert last[0].data["text/plain"].startswith("half of it\nrun again\nstopped: ")
        assert last[1].traceback == ["not done: run again"]


def test_a_training_stopped_before_its_first_step_has_the_same_exit_code(tmp_path):
    stopped = "from rsft_lib.launch import RunStopped\nraise RunStopped('run again to resume')"
    done = strict(write_notebook(tmp_path, stopped), tmp_path / "executed")
    assert done.returncode == 75 and done.stderr.endswith("not done: run again to resume\n")
    assert not (tmp_path / "small" / "status.json").exists()


KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def test_a_killed_kernel_is_an_error(tmp_path):
    notebook = write_notebook(tmp_path, KILL)
    done = strict(notebook, tmp_path / "executed")
    assert done.returncode == 1 and "was killed" in done.stderr and "Traceback" not in done.stderr
    assert str(tmp_path / "executed" / "small.ipynb") in done.stderr


@pytest.fixture
def taken_ports(monkeypatch):
    """Binds every TCP port between its choice and the start of the kernel that is to bind it."""
    launch, servers = local_provisioner.launch_kernel, []

    def take_ports_and_launch(command, **options):
        connection = json.loads(Path(command[command.index("-f") + 1]).read_text())
        if connection["transport"] == "tcp":
            ports = [port for name, port in connection.items() if name.endswith("_port")]
            servers.extend(socket.create_server((connection["ip"], port)) for port in ports)
        return launch(command, **options)

    monkeypatch.setattr(local_provisioner, "launch_kernel", take_ports_and_launch)
    yield
    for server in servers:
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere kernels use TCP ports")
@pytest.mark.usefixtures("taken_ports")
@pytest.mark.parametrize("killed", [False, True], ids=["runs another notebook", "is killed"])
def test_a_kernel_starts_though_its_ports_were_taken_and_leaves_no_file(killed, tmp_path, monkeypatch):
    temporary = tmp_path / ("long" * 30)  # a socket's path may have 107 characters
    temporary.mkdir()
    (tmp_path / "another").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    command = [sys.executable, "-m", "rsft_lib.notebook", str(write_notebook(tmp_path / "another")), str(tmp_path)]
    notebook = write_notebook(tmp_path, KILL if killed else f"import subprocess\nsubprocess.run({command}, check=True)")
    if killed:
        with pytest.raises(RuntimeError, match="was killed"):
            run(notebook, tmp_path / "executed", {})
    else:
        assert run(notebook, tmp_path / "executed", {})[1]["status"] == "done"
    assert not list(temporary.iterdir())


def test_the_status_of_an_earlier_run_does_not_count(tmp_path):
    executed, _ = run(write_notebook(tmp_path), tmp_path / "executed", {})
    book = nbformat.read(executed, 4)
    book.cells[-1].source = "pass"  # the outputs of the earlier run stay in the file
    nbformat.write(book, tmp_path / "small.ipynb")
    with pytest.raises(RuntimeError, match="last cell"):
        run(tmp_path / "small.ipynb", tmp_path / "executed", {})


def test_the_command_line_prints_summary_and_path(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-5\nsteps: 3\n")
    done = strict(write_notebook(tmp_path), tmp_path / "executed", "-f", tmp_path / "run.yaml", "-p", "steps", "4")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "all is well" in done.stdout and str(tmp_path / "executed" / "small.ipynb") in done.stdout
    assert '"steps": 4' in (tmp_path / "small" / "status.json").read_text()


def test_the_command_line_shows_a_failing_cell_without_papermills_traceback(tmp_path):
    done = strict(write_notebook(tmp_path, "raise OSError('the disk is full')"), tmp_path / "executed")
    assert done.returncode == 1 and "OSError: the disk is full" in done.stderr
    assert str(tmp_path / "executed" / "small.ipynb") in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["- lr\n- steps\n", "lr: [1\n"])
def test_an_invalid_parameter_file_is_rejected_without_a_traceback(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    done = strict(write_notebook(tmp_path), tmp_path / "executed", "-f", tmp_path / "run.yaml")
    assert done.returncode != 0 and "run.yaml" in done.stderr and "Traceback" not in done.stderr


def test_pairs_are_parsed_from_a_parameter():
    assert pairs("<|a|> -> <short>,<|b|>-><long>") == {"<|a|>": "<short>", "<|b|>": "<long>"} and pairs("") == {}
    for wrong in ("<|a|>", "<|a|> -> ", "a -> b -> c"):
        with pytest.raises(ValueError, match="expected `this -> that`"):
            pairs(wrong)
