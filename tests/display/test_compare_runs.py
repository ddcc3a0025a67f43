"""Comparison of several runs, and a published curve."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from real import REAL, needs_real
from standin import record

from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.live.run_card import Card, plot_live
from rsft_lib.display.plot_style import line_style, smoothed, thinned
from rsft_lib.display.runs import compare_runs
from rsft_lib.display.runs.compare_runs import plot_health, plot_losses, plot_modes, save_figures
from rsft_lib.display.runs.csv_curve import read_published
from rsft_lib.display.runs.curves import plot_curves
from rsft_lib.display.runs.live_answers import answers_table, plot_live_answers
from rsft_lib.display.runs.runs import differences_table, find_runs, held_out_table, runs_table, settings_table

COLUMNS = {"step": "total_steps", "loss": "train_loss", "held_out": "val_loss"}


def write_run(folder: Path, steps: int, ended: bool = True, **config) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record(step, steps)) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"lr": 1e-5, "seed": 1, "train_iters": 100, **config}))
    if ended:
        (folder / "ended.json").write_text(json.dumps({"reason": "finished", "iteration": steps}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", 100)
    write_run(folder / "b", 40, ended=False, lr=2e-5)
    write_run(folder / "deep" / "a", 10)
    (folder / "no run").mkdir()
    return folder


def strong(axes) -> list[str]:
    """Colours of the opaque lines."""
    lines = [line for line in axes.lines if line.get_alpha() in (None, 1.0) and line.get_linestyle() != "None"]
    return [line.get_color() for line in lines if len(line.get_xdata())]


def title(axes) -> str:
    return axes.get_title(loc="left")


def test_runs_are_found_once_by_folder_and_pattern_with_unique_names(folder):
    assert [run.name for run in find_runs(f"{folder}/*")] == ["a", "b"]
    runs = find_runs(f"{folder}/b, {folder}/deep/a, {folder}/*")
    assert [run.name for run in runs] == [f"{folder.name}/b", "deep/a", f"{folder.name}/a"]
    assert [len(run) for run in runs] == [40, 10, 100]


def test_a_run_on_a_plain_dataset_shows_no_mode_and_no_choice(tmp_path):
    """With the metrics that `loss_stats.metrics` returns if no answer begins with a control token."""
    run = write_run(tmp_path / "plain", 20)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    prefixes = ("loss_mode", "loss_span", "p_think", "think_share", "eval_loss_")
    plain = [{name: value for name, value in r.items() if not name.startswith(prefixes)} for r in records]
    plain = [r | {"loss_mode_other": r["loss"], "loss_span_answer": r["loss"], "loss_span_eos": 0.1} for r in plain]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in plain))
    follower = Follower(run)
    assert follower.read()
    pictures = plot_modes(find_runs(str(run))), plot_curves(run), plot_live(follower, 20)
    titles = [title(axes) for picture in pictures for axes in picture.axes]
    assert titles[:2] == ["loss of answer tokens", "loss of EOS"] and len(titles) == 8
    assert not any("mode" in text or "<think>" in text for text in titles)
    assert all(axes.lines for picture in pictures for axes in picture.axes)


def test_held_out_sets_and_answers_during_training_are_shown_from_step_0_with_intervals(tmp_path):
    run = write_run(tmp_path / "run", 20)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start = {"iteration": 0, "eval_loss": 5.5}
    for number, one in enumerate((start, records[9], records[19])):
        scores = {"accuracy": 0.25 * number, "tokens": 9.5 - number, "well_formed": 0.5, "cut_off": 3, "loops": 0.125}
        bounds = {"accuracy_low": 0.2 * number, "accuracy_high": 0.4 * number}
        one |= {f"{mode}_{name}": value for mode in ("think", "choice") for name, value in (scores | bounds).items()}
        one |= {"eval_math_loss": 6.0 - abs(number - 1), "choice_thinks": 0.375, "choice_shorts": 0.5, "questions": 8}
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [start, *records]))
    (found,), follower = find_runs(str(run)), Follower(run)

    assert len(found) == 20 and follower.read() and follower.last["iteration"] == 20
    assert [row[1:4] for row in held_out_table([found]).rows] == [
        ("held-out", "5.500", f"{records[19]['eval_loss']:.3f} at 20"), ("held-out math", "5.000", "5.000 at 0"),
    ]  # fmt: skip
    think, choice = answers_table([found]).rows
    assert think == ("run", "20", "<think>", "50.0%", "40% to 80%", "50.0%", "3", "12.5%", "7.5", "–", "–")
    assert choice[2] == "own choice" and choice[-2:] == ("37.5%", "50.0%")
    assert "no run has answered" in answers_table(find_runs(str(write_run(tmp_path / "none", 3)))).title

    panels = {title(axes): axes for axes in plot_live_answers([found]).axes}
    assert panels["correct <think> answers"].lines[0].get_xydata().tolist() == [[0, 0], [10, 0.25], [20, 0.5]]
    (band,) = panels["correct <think> answers"].collections
    assert {(0, 0), (10, 0.2), (10, 0.4), (20, 0.4), (20, 0.8)} <= set(
        map(tuple, band.get_paths()[0].vertices.round(9))
    )
    losses, *_ = plot_losses([found]).axes
    assert "● held-out, ■ held-out math" in title(losses)
    for axes in (plot_curves(run).axes[0], plot_live(follower, 20).axes[0]):
        marks = {line.get_label(): line.get_xdata().tolist() for line in axes.lines}
        assert marks["held-out math"] == [0, 10, 20] and marks["held-out"][0] == 0
    facts = Card(follower.last, 20, "training").facts()
    assert facts["held-out math"] == "5.000" and facts["<think> correct"] == "50.0% (40% to 80%)"


def test_every_picture_draws_the_loss_smoothed_over_its_raw_values(folder):
    (run,), follower = find_runs(str(folder / "a")), Follower(folder / "a")
    follower.read()
    raw = run.line("loss", "step")[1].tolist()
    for picture in (plot_losses([run]), plot_curves(folder / "a"), plot_live(follower, 100)):
        drawn = [line.get_ydata().tolist() for line in picture.axes[0].lines]
        assert raw in drawn and smoothed(raw, 0.9) in drawn
    for picture in (plot_losses([run], smoothing=0), plot_curves(folder / "a", smoothing=0)):
        assert [line.get_ydata().tolist() for line in picture.axes[0].lines].count(raw) == 1


ODD = [
    "lr $1e-5$",
    "a $b",
    "lr=1,bs=2",
    "grid[1]",
    "_quiet",
    "100% {x}",
    r"\frac{1}$x^$",
    "esc\x1b[31m\u202etxt",
    "دورة",
]


def test_runs_of_any_name_are_found_and_labelled(tmp_path):
    """matplotlib parses text between dollar signs as mathematics, and raises if it is invalid."""
    runs = [write_run(tmp_path / name, 5) for name in ODD]
    write_run(tmp_path / "grid[1]" / "inner", 5)
    found = find_runs(",".join(map(str, runs)))
    assert [run.name for run in found] == ODD
    assert [run.name for run in find_runs(f"{tmp_path}/*")] == sorted(ODD)
    assert [run.name for run in find_runs(f"{tmp_path}/grid[1]/*, {tmp_path}/lr=*")] == ["inner", "lr=1,bs=2"]
    save_figures({"losses": plot_losses(found), "modes": plot_modes(found), "health": plot_health(found)}, tmp_path)
    shown = html.unescape((tmp_path / "losses.svg").read_text(encoding="utf-8"))
    drawn = re.findall(r"<!-- (.*?) -->", shown)
    assert [name for name in ODD[:7] if name not in drawn] == [] and "esc⟨001B⟩[31m⟨202E⟩txt" in drawn
    assert "دورة" in drawn and "\x1b" not in shown
    page = repr(runs_table(found)) + runs_table(found)._repr_html_()
    assert "esc␛[31m⟨202E⟩txt" in page and "\x1b" not in page and "\u202e" not in page and "دورة" in page


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ("", ValueError, "no run given"), ("{}/nowhere", FileNotFoundError, "nowhere"),
        ("{}/z*", FileNotFoundError, "matches no folder"), ("{}/no run", ValueError, "has no metrics yet"),
    ],
)  # fmt: skip
def test_a_missing_run_is_named_in_the_error(folder, runs, error, message):
    with pytest.raises(error, match=message):
        find_runs(runs.format(folder))


def test_only_differing_settings_are_in_the_table_of_differences(folder):
    runs = find_runs(f"{folder}/a,{folder}/b")
    assert differences_table(runs).rows == [("lr", "1e-05", "2e-05")]
    assert len(settings_table(runs).rows) == 3
    assert differences_table(runs[:1]).rows == [] and "same settings" in repr(differences_table(runs[:1]))
    a, b = runs_table(runs).rows
    assert a[:3] == ("a", "100 of 100", "finished") and b[:3] == ("b", "40 of 100", "running, or killed")


def test_x_is_steps_tokens_minutes_or_the_share_of_the_run(folder):
    (run,) = find_runs(f"{folder}/b")
    assert [run.x(by)[-1] for by in ("step", "token", "time", "share")] == [40, 40 * 900, pytest.approx(1 / 3), 40]
    with pytest.raises(ValueError, match="by is 'epoch'"):
        plot_losses([run], by="epoch")
    with pytest.raises(ValueError, match="smoothing is 1"):
        plot_modes([run], smoothing=1.0)


@pytest.mark.parametrize("by", ["step", "token", "time", "share"])
def test_every_run_has_its_own_line_in_every_panel(folder, by):
    runs = find_runs(f"{folder}/*")
    for figure in (plot_losses(runs, by), plot_modes(runs, by), plot_health(runs, by)):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
        panels = [axes for axes in figure.axes if title(axes) != "loss of the control token"]
        assert {tuple(strong(axes)) for axes in panels} == {(line_style(0)["color"], line_style(1)["color"])}


def test_a_panel_without_data_has_a_message(folder):
    axes = {title(a): a for a in plot_modes(find_runs(f"{folder}/a")).axes}
    assert axes["loss of the control token"].texts[0].get_text() == "not recorded in these runs"
    assert not axes["loss of <think> answers"].texts


def test_a_fifth_metric_of_health_leaves_no_empty_panel(folder, monkeypatch):
    monkeypatch.setattr(compare_runs, "HEALTH", [*compare_runs.HEALTH, "loss"])
    assert [title(axes) for axes in plot_health(find_runs(f"{folder}/a")).axes][4:] == ["loss per trained token"]


def test_thirty_runs_have_distinct_line_styles():
    assert len({(line_style(i)["color"], line_style(i)["linestyle"]) for i in range(30)}) == 30


def test_downsampling_keeps_extremes_order_and_end():
    x, y = np.arange(100_000.0), np.random.default_rng(0).normal(size=100_000)
    y[[17, 77_777]] = 50, -50
    kept_x, kept_y = thinned(x, y)
    assert len(kept_x) <= 1000 and (np.diff(kept_x) > 0).all() and kept_x[-1] == x[-1]
    assert {50.0, -50.0} <= set(kept_y) and np.array_equal(y[kept_x.astype(int)], kept_y)


def test_a_smoothed_constant_is_that_constant():
    assert smoothed([2.5] * 10, 0.9) == pytest.approx([2.5] * 10) and smoothed([1, 5], 0) == [1, 5]


def curve(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_published_curve_is_plotted_with_ours(folder, tmp_path):
    text = "epoch,total_steps,train_loss,val_loss\n1,50,0.7,0.6\n1,100,0.5,\n2,150,0.4,0.3\n"
    theirs = read_published(curve(tmp_path / "theirs.csv", text), COLUMNS)
    assert theirs.line("held_out", "step")[1].tolist() == [0.6, 0.3]
    assert theirs.line("loss", "share")[0].tolist() == pytest.approx([100 / 3, 200 / 3, 100])
    figure = plot_losses(find_runs(f"{folder}/a"), published=theirs)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "theirs, train", "theirs, held-out"}
    with pytest.raises(ValueError, match="cannot be plotted by 'token'"):
        plot_losses(find_runs(f"{folder}/a"), by="token", published=theirs)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("a,b\n1,2\n", {"step": "a", "loss": "c"}, r"has columns \['a', 'b'\], but not c"),
        ("a,b\n1,2\n3,much\n", {"step": "a", "loss": "b"}, r"x.csv:3: found 'much', expected a number"),
        ("a,b\n", {"step": "a", "loss": "b"}, "has no rows"),
        ("a,b\n1,2\n", {"loss": "b"}, "expected at least one of step"),
        ("a,b\n1,2\n", {"step": "a", "los": "b"}, "expected at least one of step"),
    ],
)
def test_an_invalid_csv_is_rejected_with_its_location(tmp_path, text, columns, message):
    with pytest.raises(ValueError, match=message):
        read_published(curve(tmp_path / "x.csv", text), columns)


@needs_real
def test_a_real_published_curve_is_read_completely(folder):
    path = Path(REAL, "curves/rasbt_deepseek-r1-2048_distill_metrics.csv")
    theirs = read_published(path, COLUMNS)
    x, values = theirs.line("held_out", "step")
    assert len(x) == 403 and (x[0], x[-1], values[0], values[-1]) == (50, 20_046, 0.698918, 0.534255)
    plot_losses(find_runs(f"{folder}/*"), "share", published=theirs)


def test_figures_of_a_long_run_are_saved_as_small_png_and_svg(tmp_path):
    runs = find_runs(str(write_run(tmp_path / "long", 20_000)))
    table = save_figures({"losses": plot_losses(runs)}, tmp_path / "out")
    png, svg = (Path(path) for path, _ in table.rows)
    assert png.read_bytes()[:4] == b"\x89PNG" and svg.read_text().startswith("<?xml")
    assert svg.stat().st_size < 300_000 and [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        png.name,
        svg.name,
    ]
