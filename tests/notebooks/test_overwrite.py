"""No step overwrites the output of another source, unless `overwrite` is set."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT

from rsft_lib import demo
from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.common.artifact import read_manifest, verify, write_manifest
from rsft_lib.data.exclude import exclude
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.notebook import run
from rsft_lib.tokenizer.patch import patch_tokenizer

SHORT = {"<|quad_start|>": "<short>"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two sets, `one` and `other`, each with model, tokenizer, answers, dataset, tokens and run."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "other")):
        place = folder / name
        demo.make_model(place / "model", seed)
        demo.make_sources(place / "answers", 40, seed)
        patch_tokenizer(place / "model", place / "tokenizer", SHORT)
        convert(place / "model", place / "base")
        build_hybrid(*answers(place), place / "data", 0.1, seed=1)
        tokenize(place / "data" / "train.jsonl", place / "tokenizer", place / "tokens", 513, workers=0)
        for iteration in (1, 2):
            saved(place, iteration)
    return folder


def answers(place: Path) -> tuple[Path, Path]:
    return place / "answers" / "long.jsonl", place / "answers" / "short.jsonl"


def saved(place: Path, iteration: int, base: str = "base") -> None:
    """A checkpoint of a run, with its initial weights."""
    folder = shutil.copytree(place / "base", place / "run" / f"iter_{iteration:07d}", dirs_exist_ok=True)
    config = {"checkpoint": str(place / base), "data": str(place / "tokens")}
    write_manifest(folder, {"made_by": "train", "iteration": iteration, "config": config})


def checkpoint(place: Path, iteration: int) -> Path:
    return place / "run" / f"iter_{iteration:07d}"


def tokens(place: Path, to: Path, **how) -> dict:
    return tokenize(place / "data" / "train.jsonl", place / "tokenizer", to, 513, workers=0, **how)


Step = Callable[..., dict]
STEPS: dict[str, tuple[Step, Step]] = {  # a step, and the same with another option or a newer checkpoint
    "01": (
        lambda place, to, **how: patch_tokenizer(place / "model", to, SHORT, **how),
        lambda place, to: patch_tokenizer(place / "model", to, SHORT, trailing_newline=True),
    ),
    "02": (
        lambda place, to, **how: convert(place / "model", to, **how),
        lambda place, to: convert(place / "model", to, dtype="bfloat16"),
    ),
    "02 of a run": (
        lambda place, to, **how: convert(checkpoint(place, 1), to, **how),
        lambda place, to: convert(checkpoint(place, 2), to, dtype="bfloat16"),
    ),
    "03": (
        lambda place, to, **how: build_hybrid(*answers(place), to, 0.1, seed=1, **how),
        lambda place, to: build_hybrid(*answers(place), to, 0.2, seed=2),
    ),
    "04": (tokens, lambda place, to: tokens(place, to, turns="last")),
    "07": (
        lambda place, to, **how: export(checkpoint(place, 1), place / "tokenizer", to, **how),
        lambda place, to: export(checkpoint(place, 2), place / "tokenizer", to),
    ),
    "08": (
        lambda place, to, overwrite=False: exclude(TokenStore(place / "tokens"), [0], to, overwrite),
        lambda place, to: exclude(TokenStore(place / "tokens"), [1, 2], to),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_overwrites_outputs_of_another_source_only_on_request(made, tmp_path, name):
    step, again = STEPS[name]
    out, one, other = tmp_path / "out", made / "one", made / "other"
    step(one, out)
    again(one, out)
    kept = verify(out)
    with pytest.raises(FileExistsError) as error:
        step(other, out)
    message = str(error.value)
    assert message.startswith(f"{out} was made from {one}") and f"from {other}" in message
    assert message.endswith("choose another `output`, or set `overwrite` to replace it")
    assert verify(out) == kept
    step(other, out, overwrite=True)
    assert verify(out) != kept
    with pytest.raises(FileExistsError, match="is not replaced"):
        step(one, out)


def test_another_tokenizer_is_another_source(made, tmp_path):
    tokens(made / "one", tmp_path / "out")
    for tokenizer, overwrite in (("other", False), ("other", True)):
        arguments = (made / "one" / "data" / "train.jsonl", made / tokenizer / "tokenizer", tmp_path / "out", 513)
        if overwrite:
            tokenize(*arguments, workers=0, overwrite=True)
        else:
            with pytest.raises(
                FileExistsError, match="out was made from .*one/tokenizer and .* from .*other/tokenizer"
            ):
                tokenize(*arguments, workers=0)


def test_a_run_from_another_model_in_the_same_folder_is_another_source(made, tmp_path):
    place = shutil.copytree(made / "one", tmp_path / "place")
    saved(place, 1)
    export(checkpoint(place, 1), place / "tokenizer", tmp_path / "out")
    saved(place, 1, base="another")
    with pytest.raises(FileExistsError, match="out was made from .*/base and is not replaced by .* from .*/another: "):
        export(checkpoint(place, 1), place / "tokenizer", tmp_path / "out")


def test_a_recreated_or_moved_source_is_the_same_source(made, tmp_path):
    place = shutil.copytree(made / "one", tmp_path / "one")
    build_hybrid(*answers(place), tmp_path / "out", 0.1, seed=1)
    moved = shutil.copytree(place / "answers", tmp_path / "moved")
    build_hybrid(moved / "long.jsonl", moved / "short.jsonl", tmp_path / "out", 0.1, seed=2)
    demo.make_sources(moved, 50, seed=3)
    built = build_hybrid(moved / "long.jsonl", moved / "short.jsonl", tmp_path / "out", 0.1, seed=2)
    assert sum(built["problems"].values()) == 50


def test_the_demo_can_be_recreated_with_other_settings(tmp_path):
    for seed in (1, 2):
        demo.make_model(tmp_path / "model", seed)
        demo.make_sources(tmp_path / "answers", 10 * seed, seed)
    assert read_manifest(tmp_path / "answers")["problems"] == 20


def test_each_notebook_with_an_output_has_the_parameter():
    for name in ("01_patch_tokenizer", "02_convert_checkpoint", "03_build_dataset", "04_tokenize_and_inspect",
                 "07_export_and_generate", "08_loss_lab"):  # fmt: skip
        assert declared_parameters(ROOT / "notebooks" / f"{name}.ipynb")["overwrite"] == ("bool", False), name


def test_notebook_01_for_another_model_keeps_the_earlier_tokenizer(made, tmp_path):
    out, notebook = tmp_path / "out", ROOT / "notebooks" / "01_patch_tokenizer.ipynb"
    patch_tokenizer(made / "one" / "model", out, SHORT)
    asked = {"model": str(made / "other" / "model"), "output": str(out)}
    with pytest.raises(RuntimeError, match="FileExistsError: .*out was made from .*/one/model and is not replaced"):
        run(notebook, tmp_path / "executed", asked)
    run(notebook, tmp_path / "executed", asked | {"overwrite": True})
    assert read_manifest(out)["source"] == str(made / "other" / "model")
