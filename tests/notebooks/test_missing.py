"""Errors about missing inputs name the notebook that creates them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from real import LONG
from support import ROOT, random_store, settings, tiny_model, tiny_tokenizer

from rsft_lib import demo
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.hub import model_folder
from rsft_lib.checkpoint.run_checkpoints import last_checkpoint
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.exclude import exclude
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.splits import splits_of
from rsft_lib.data.store import TokenStore
from rsft_lib.display.runs.curves import plot_curves
from rsft_lib.display.runs.runs import find_runs
from rsft_lib.evaluation.token_loss_cache import scored
from rsft_lib.generation.generate import generate
from rsft_lib.notebook import run
from rsft_lib.tokenizer.contract import check_contract
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.preflight import preflight


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A model, a tokenizer, tokens whose dataset was deleted, a dataset, and a run without a checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model")
    tiny_tokenizer(folder / "tokenizer")
    facts = {"data": str(folder / "gone.jsonl"), "counts": {"records": 60}}
    random_store(folder / "tokens", facts=facts | {"options": {"max_length": 99, "overlong": "drop"}})
    demo.make_sources(folder / "answers", 20, seed=0)
    build_hybrid(folder / "answers" / "long.jsonl", "", folder / "dataset", 0.0, seed=0)
    (folder / "run").mkdir()
    return folder


def plan(inputs: Path, **changes) -> None:
    given = {"checkpoint": "model", "data": "tokens", "eval_data": "tokens"} | changes
    preflight(settings(**{name: str(inputs / path) for name, path in given.items()}, output=str(inputs / "out")), 1)


NOTEBOOKS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a model that is not a name on the Hub": ("01_patch_tokenizer", lambda t: model_folder("assets/checkpoints/none")),
    "a tokenizer": ("01_patch_tokenizer", lambda t: load_tokenizer(t / "none")),
    "a tokenizer to check": ("01_patch_tokenizer", lambda t: check_contract(t / "none")),
    "a tokenizer to count tokens": (
        "01_patch_tokenizer",
        lambda t: build_hybrid(t / "answers" / "long.jsonl", "", t / "new", 0.1, 1, tokenizer=t / "none"),
    ),
    "a tokenizer to export": ("01_patch_tokenizer", lambda t: export(t / "model", t / "none", t / "new")),
    "a checkpoint to start from": ("02_convert_checkpoint", lambda t: plan(t, checkpoint="none")),
    "a checkpoint to score": ("02_convert_checkpoint", lambda t: scored(t / "none", t / "tokens", t / "new", 1)),
    "a dataset to tokenize": ("03_build_dataset", lambda t: splits_of(str(t / "none"))),
    "the dataset of tokens": ("03_build_dataset", lambda t: exclude(TokenStore(t / "tokens"), [0], t)),
    "tokens": ("04_tokenize_and_inspect", lambda t: plan(t, data="none")),
    "tokens for evaluation": ("04_tokenize_and_inspect", lambda t: plan(t, eval_data="none")),
    "tokens to score": ("04_tokenize_and_inspect", lambda t: scored(t / "model", t / "none", t / "new", 1)),
    "tokens instead of a dataset": ("04_tokenize_and_inspect", lambda t: plan(t, data="dataset")),
    "a run": ("05_train", lambda t: find_runs(str(t / "none"))),
    "any run": ("05_train", lambda t: find_runs(f"{t}/none-*")),
    "a run to plot": ("05_train", lambda t: plot_curves(t / "none")),
    "a run to export": ("05_train", lambda t: last_checkpoint(t / "none")),
    "a checkpoint in a run": ("05_train", lambda t: last_checkpoint(t / "run")),
    "an exported model": ("07_export_and_generate", lambda t: generate(t / "none", ["?"], None)),
}


@pytest.mark.parametrize("what", NOTEBOOKS)
def test_the_error_names_the_notebook_to_run(inputs, what):
    notebook, use = NOTEBOOKS[what]
    with pytest.raises(FileNotFoundError, match=f"(?s)(none|gone|text_document|run\\b).*: run notebook {notebook}"):
        use(inputs)


WITHOUT = [
    (
        "08_loss_lab",
        dict.fromkeys(("before", "run", "data"), "none"),
        "checkpoint: .*none does not exist: run notebook 02_convert_checkpoint",
    )
]
if LONG:
    WITHOUT += [
        (
            "07_export_and_generate",
            {"run": "empty", "tokenizer": "none", "held_out": "none"},
            "empty has no intact checkpoint: run notebook 05_train",
        )
    ]


@pytest.mark.parametrize(("notebook", "given", "needed"), WITHOUT)
def test_a_notebook_without_its_input_names_the_one_to_run(tmp_path, notebook, given, needed):
    (tmp_path / "empty").mkdir()
    given = {name: str(tmp_path / path) for name, path in given.items()}
    with pytest.raises(RuntimeError, match=needed):
        run(ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path / "executed", given | {"output": str(tmp_path / "out")})


def test_the_error_for_a_model_without_a_tokenizer_does_not_name_a_notebook(tmp_path):
    with new_folder(tmp_path / "model", {"made_by": "step"}):
        pass
    with pytest.raises(FileNotFoundError, match="tokenizer of the model: .* does not exist: check the path"):
        patch_tokenizer(tmp_path / "model", tmp_path / "out", {"a": "b"})
