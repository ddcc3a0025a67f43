"""The notebooks in Qwen3's dialect, up to a model that answers held-out questions in the mode asked for."""

from pathlib import Path

import pytest
from chain import chained, outputs
from support import ROOT

from rsft_lib import demo
from rsft_lib.checkpoint.convert import convert
from rsft_lib.data.records import read_records
from rsft_lib.data.store import TokenStore
from rsft_lib.generation.generate import trained_dialect
from rsft_lib.launch import launch_training
from rsft_lib.notebook import run
from rsft_lib.tokenizer.dialect import QWEN3
from rsft_lib.tokenizer.patch import load_tokenizer
from rsft_lib.training.config import TrainConfig

EMPTY = "<think>\n\n</think>\n\n"
STEPS, QUESTIONS = 50, 40


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, tuple[Path, dict]]]:
    """(folder, executed notebook and status of 01, 03, 04 and 07)."""
    folder = tmp_path_factory.mktemp("dialect")
    demo.make_model(folder / "model", seed=1)
    demo.make_sources(folder / "sources", 800, seed=1)
    given, steps = chained(folder), {}
    given["01_patch_tokenizer"] |= {"dialect": "qwen3", "replacements": ""}
    given["03_build_dataset"]["dialect"] = given["04_tokenize_and_inspect"]["dialect"] = "qwen3"
    given["03_build_dataset"]["budget_share"] = 0.0  # whole thoughts, to compare with the sources
    given["07_export_and_generate"] |= {"questions": QUESTIONS, "verify": False}
    for name in ("01_patch_tokenizer", "03_build_dataset", "04_tokenize_and_inspect", "07_export_and_generate"):
        if name.startswith("07"):
            train_model(folder, steps["04_tokenize_and_inspect"][1]["folders"])
        steps[name] = run(ROOT / "notebooks" / f"{name}.ipynb", folder / "executed", given[name])
    return folder, steps


def train_model(folder: Path, data: dict[str, str]) -> None:
    convert(folder / "model", folder / "megatron")
    places = {"checkpoint": str(folder / "megatron"), "output": str(folder / "run")}
    short = demo.TINY | {"seq_length": 512, "global_batch_size": 2, "train_iters": STEPS, "eval_interval": STEPS}
    launch_training(TrainConfig(**short, **places, data=data["train"], eval_data=data["heldout"]), 1)


def test_the_rows_are_those_of_the_sources_in_the_dialect(done):
    folder, _ = done
    written = {}
    for split in ("train", "heldout"):
        for _, row in read_records(folder / "hybrid" / f"{split}.jsonl"):
            written[row["instruction"]] = row["output"]
    expected = {}
    for problem in demo.problems(800, seed=1):
        expected[problem["problem"] + " /think"] = problem["think"]  # is already in Qwen3's form
        expected[problem["problem"] + " /no_think"] = EMPTY + problem["short"]
    assert written == expected


def test_a_tiny_model_learns_to_answer_in_the_mode_asked_for(done):
    """At least 95 % of the answers to held-out questions, with and without thoughts in the think block."""
    _, steps = done
    status = steps["07_export_and_generate"][1]
    assert status["as_asked"]["think"] >= 0.95 and status["as_asked"]["short"] >= 0.95, status


def test_the_notebooks_show_the_mode_of_every_sample_and_the_metrics_know_both(done):
    folder, steps = done
    status = steps["04_tokenize_and_inspect"][1]
    store = TokenStore(Path(status["folders"]["train"]))
    assert {mode: counts["written"] for mode, counts in store.manifest["modes"].items()} == {"think": 720, "short": 720}
    shown = "".join(str(output.get("data", {})) for output in outputs(steps["04_tokenize_and_inspect"][0]))
    assert "mode think" in shown and "mode short" in shown and "empty chain of thought" not in shown
    metrics = (folder / "run" / "metrics.jsonl").read_text()
    assert "loss_mode_think" in metrics and "loss_mode_short" in metrics and "loss_mode_other" not in metrics


def test_the_exported_model_is_served_by_the_soft_and_the_hard_switch(done):
    folder, _ = done
    tokenizer, chat = load_tokenizer(folder / "out"), [{"role": "user", "content": "2 + 2 ? /no_think"}]
    plain, off = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **given)
        for given in ({}, {"enable_thinking": False})
    )
    assert off == plain + EMPTY and plain.endswith("2 + 2 ? /no_think<｜Assistant｜>")
    assert trained_dialect(folder / "out") == QWEN3, "recorded, so that it is asked in the dialect of its data"
    card = (folder / "out" / "README.md").read_text()
    assert "What is 17 times 23? /no_think" in card and "`/think` or `/no_think`" in card and "<short>" not in card
