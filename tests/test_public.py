"""What `import rsft_lib` offers, the examples, and a wheel that is installed by itself."""

import dataclasses
import os
import pydoc
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rsft_lib
from rsft_lib import demo
from rsft_lib.launch import LaunchOptions
from rsft_lib.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def python(folder: Path, *arguments, **environment) -> str:
    """What a Python that is started in `folder` prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_public_name_is_there_and_in_the_table_of_contents():
    listed = re.findall(r"^    (\w+)   ", rsft_lib.__doc__, re.MULTILINE)
    assert listed == rsft_lib.__all__ and set(listed) <= set(dir(rsft_lib))
    assert all(callable(getattr(rsft_lib, name)) and getattr(rsft_lib, name).__doc__ for name in listed)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        rsft_lib.trian  # noqa: B018


def test_help_explains_every_setting():
    for kind in (TrainConfig, LaunchOptions):
        shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
        assert all(re.search(rf"{field.name}: .*\n +\|? +\S", shown) for field in dataclasses.fields(kind))
    assert "lr: float = 1e-05\n |      Peak learning rate, reached after warm-up." in pydoc.render_doc(
        TrainConfig, renderer=pydoc.plaintext
    )


def test_metrics_of_a_folder_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"run folder: {tmp_path}/nowhere does not exist"):
        rsft_lib.read_metrics(f"{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("module", "slow"),
    [("rsft_lib", {"torch", "megatron", "numpy"}), ("rsft_lib.project", {"torch", "transformers", "nbformat"})],
)
def test_importing_the_kit_or_its_projects_imports_no_slow_library(tmp_path, module, slow):
    code = f"import sys, {module}; print([name for name in {slow} if name in sys.modules])"
    assert python(tmp_path, "-c", code, PYTHONPATH=str(EXAMPLES.parent)).strip() == "[]"


def test_the_examples_train_and_read_logits_with_paths_relative_to_the_working_directory(tmp_path):
    demo.make_model(tmp_path / "tiny", seed=1)
    demo.make_sources(tmp_path / "answers", 40, seed=1)
    rows = (tmp_path / "answers" / "long.jsonl").read_text().splitlines()[:40]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")
    where = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    printed = python(tmp_path, EXAMPLES / "train.py", "tiny", "data.jsonl", "out", **where)
    steps = [int(step) for step in re.findall(r"^step +(\d+)/\d+ +loss ", printed, re.MULTILINE)]
    assert "<think>" in printed and steps and steps == sorted(set(steps))  # each printed once
    assert " packs" not in printed  # of the estimate at the start
    assert {"megatron", "tokens", "run", "exported"} <= {path.name for path in (tmp_path / "out").iterdir()}
    printed = python(tmp_path, EXAMPLES / "logits.py", "out/exported", "out/megatron", "1 + 1 =", **where)
    values = [float(line.split()[0]) for line in printed.splitlines()[-5:]]
    assert values == sorted(values, reverse=True)


def test_a_wheel_has_every_module_and_says_in_one_line_that_notebooks_need_a_checkout(tmp_path):
    root, library = EXAMPLES.parent, EXAMPLES.parent / "rsft_lib"
    shutil.copytree(library, tmp_path / "copy" / "rsft_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):  # a build leaves files where it builds
        shutil.copy(root / name, tmp_path / "copy")
    python(tmp_path, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "copy")
    (wheel,) = tmp_path.glob("rsft_lib-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for pattern in ("*.py", "*.jinja") for path in library.rglob(pattern)}
    assert {path.relative_to(library.parent).as_posix() for path in files} <= names

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-m", "rsft_lib.notebook", str(root / "notebooks" / "00_quickstart.ipynb"), "out"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(
        r"error: the notebooks need a checkout of the project.*\n", done.stderr
    )
