"""Metrics by mode and span, and their plots."""

import json
import shutil

import forked
import matplotlib.pyplot as plt
import nbformat
import pytest
from standin import ended_job
from support import ROOT, random_store, settings, tiny_model

from rsft_lib import demo
from rsft_lib.checkpoint.convert import convert
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.display.live.live import LiveRun
from rsft_lib.display.plot_style import plain_numbers
from rsft_lib.display.runs.curves import plot_curves, summary
from rsft_lib.notebook import run as run_notebook
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.metrics import read_metrics

STEPS = 6
LOSSES = {f"loss_{kind}" for kind in ("mode_think", "mode_short", "span_control", "span_think", "span_answer")}
CHOICES = {"p_think_when_think", "p_think_when_short", "think_share"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hybrid dataset of demo problems, and a run on it."""
    folder = tmp_path_factory.mktemp("modes")
    model = demo.make_model(folder / "model", seed=1)
    patch_tokenizer(model, folder / "tokenizer", {"<|quad_start|>": "<short>"})
    convert(model, folder / "megatron")
    sources = demo.make_sources(folder / "sources", 150, seed=1)
    build_hybrid(sources / "long.jsonl", sources / "short.jsonl", folder / "hybrid", held_out=0.2, seed=1)
    for split in ("train", "heldout"):
        tokenize(folder / "hybrid" / f"{split}.jsonl", folder / "tokenizer", folder / split, max_length=129)
    config = settings(
        checkpoint=str(folder / "megatron"), data=str(folder / "train"), eval_data=str(folder / "heldout"),
        output=str(folder / "run"), seq_length=256, train_iters=STEPS, eval_interval=3, eval_iters=50, lr=2e-3,
    )  # fmt: skip
    forked.train(config)
    return folder


def test_metrics_by_mode_match_the_samples_of_the_step(folder):
    store, tokenizer = TokenStore(folder / "train"), load_tokenizer(folder / "tokenizer")
    data, records = PackedDataset(store, 256, seed=1234), read_metrics(folder / "run")
    assert len(records) == STEPS
    for number, record in enumerate(records):
        texts = [tokenizer.decode(store[sample][0]) for sample in data.samples(data.step(number, 4))]
        thinking = sum("<think>" in text for text in texts)
        assert thinking + sum("<short>" in text for text in texts) == len(texts)
        assert record["think_share"] == pytest.approx(thinking / len(texts))
        for mode, there in (("think", thinking > 0), ("short", thinking < len(texts))):
            assert (f"loss_mode_{mode}" in record) == (f"p_think_when_{mode}" in record) == there
        assert record.keys() >= {"loss_span_control", "loss_span_answer", "loss_span_eos"}
        assert all(0 < value < 1 for name, value in record.items() if name.startswith("p_think"))


def test_evaluations_have_metrics_by_mode(folder):
    evaluated = [record for record in read_metrics(folder / "run") if "eval_loss" in record]
    assert [record["iteration"] for record in evaluated] == [3, 6]
    assert all(record.keys() >= {f"eval_{name}" for name in LOSSES | CHOICES} for record in evaluated)


def test_every_panel_of_a_run_has_its_lines(folder, capsys):
    axes = {axis.get_title(loc="left").split(",")[0]: axis for axis in plot_curves(folder / "run").axes}
    by_kind = axes["loss by mode (lines) and span (dots)"]
    assert {text.get_text() for text in by_kind.get_legend().get_texts()} >= {"<think>", "<short>", "answer", "EOS"}
    assert len(axes["probability of <think> vs. <short>"].lines) == 3
    assert all(axis.lines for axis in axes.values()) and len(axes) == 6
    assert "P(<think>)" in summary(folder / "run", {}, folder / "model")
    live = LiveRun(ended_job(folder / "run", STEPS))
    live.poll()
    live.end()
    assert f"step {STEPS}/{STEPS}  loss" in capsys.readouterr().out and live.state == "finished"


@pytest.mark.parametrize("limits", [(9.8, 12.4), (10.2, 12.3), (0.9, 5.5), (0.06, 12.0), (1e-4, 12.0)])
def test_a_loss_axis_of_any_range_has_readable_labels(limits):
    figure, axes = plt.subplots()
    axes.plot([1, 2], limits)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    plain_numbers(axes)
    figure.canvas.draw()
    values = [
        float(text.get_text().replace("−", "-")) for text in axes.yaxis.get_ticklabels(which="both") if text.get_text()
    ]
    assert 3 <= sum(limits[0] <= value <= limits[1] for value in values) <= 12, values
    plt.close(figure)


def test_data_without_modes_is_plotted_and_alarms_are_marked(tmp_path, capsys):
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    store = random_store(tmp_path / "store")
    run = settings(checkpoint=str(tmp_path / "megatron"), data=str(store), output=str(tmp_path / "run"), train_iters=2)
    forked.train(run)
    *before, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.dumps({**json.loads(last), "alarms": ["loss spike"]}) + "\n"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join([*before, last]))
    axes = {axis.get_title(loc="left").split(",")[0]: axis for axis in plot_curves(tmp_path / "run").axes}
    assert axes["loss by mode (lines) and span (dots)"].texts[0].get_text() == "the data has no modes"
    assert [line.get_xdata()[0] for line in axes["loss per trained token"].lines[2:]] == [2]
    live = LiveRun(ended_job(tmp_path / "run", 2))
    live.poll()
    assert "ALARM: step 2: loss spike" in capsys.readouterr().out


def outputs(path) -> list[dict]:
    """The displayed outputs of an executed notebook."""
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return [output.data for cell in cells for output in cell.outputs if "data" in output]


def test_notebook_06_overlays_runs_and_saves_figures(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "other")
    (tmp_path / "other" / "ended.json").unlink()
    given = {"runs": f"{folder / 'run'}, {tmp_path / 'other'}", "by": "token", "output": str(tmp_path / "out")}
    executed, status = run_notebook(ROOT / "notebooks" / "06_loss_curves.ipynb", tmp_path, given)
    assert status["runs"]["run"] == status["runs"]["other"] and status["runs"]["run"]["steps"] == STEPS
    names = ["answers.png", "health.png", "losses.png", "modes.png"]
    assert [path.name for path in sorted((tmp_path / "out").glob("*.png"))] == names
    shown = outputs(executed)
    assert sum("image/png" in data for data in shown) == len(names)
    assert any("running, or killed" in data["text/plain"] for data in shown)


@pytest.fixture(scope="module")
def lab(folder):
    """Notebook 08, twice."""
    given = {
        "before": str(folder / "megatron"), "run": str(folder / "run"), "data": str(folder / "train"), "nproc": 1,
        "output": str(folder / "lab"), "filtered": str(folder / "filtered"), "leave_out": "rose, outlier, twice",
    }  # fmt: skip
    notebook = ROOT / "notebooks" / "08_loss_lab.ipynb"
    return [run_notebook(notebook, folder / name, given) for name in ("first", "second")]


def test_notebook_08_scores_both_checkpoints_and_filters_the_data(folder, lab):
    executed, status = lab[0]
    after = next(r for r in read_metrics(folder / "run") if r["iteration"] == STEPS)
    assert status["losses"]["after"] < status["losses"]["before"] and after["loss"] < status["losses"]["before"]
    listed = [json.loads(line) for line in (folder / "lab" / "suspects.jsonl").read_text().splitlines()]
    out = {entry["line"] for entry in listed if {"rose", "outlier", "twice"} & set(entry["why"])}
    lines = (folder / "hybrid" / "train.jsonl").read_bytes().splitlines()
    kept = (folder / "filtered" / "train.jsonl").read_bytes().splitlines()
    assert kept == [line for number, line in enumerate(lines, start=1) if number not in out]
    assert status["suspects"] == len(listed) and status["filtered"]["kept"] == len(kept)
    shown = outputs(executed)
    assert sum("image/png" in data for data in shown) == 1
    assert sum("<b>before</b>, mean" in data.get("text/html", "") for data in shown) >= 3
    assert executed.stat().st_size < 1_000_000


def test_notebook_08_run_again_uses_the_cache_and_reports_the_same(lab):
    (_, first), (executed, second) = lab
    assert {**first, "finished": ""} == {**second, "finished": ""}
    assert executed.read_text().count("using cached losses of this checkpoint and data") == 2
