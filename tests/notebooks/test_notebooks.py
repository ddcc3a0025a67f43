"""All notebooks headless, and in JupyterLab.

The notebooks run once, headless, as a chain. A real Chromium opens the executed ones, and runs the interactive ones: 04
with its slider, 05 with its dashboard and 08 with its clickable plot. Screenshots are saved in outputs/screenshots.
"""

import json
import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pytest
from browser import CHROMIUM, PATIENCE, Browser, copy_project, install_trusted, jupyterlab, missing, set_defaults
from chain import STEPS, chained, outputs, pictures
from contrast import ENOUGH, texts
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsft_lib import demo
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common.artifact import own_manifest
from rsft_lib.notebook import run
from rsft_lib.training.metrics import scan_metrics

NOTEBOOKS = ROOT / "notebooks"
in_browser = pytest.mark.skipif(bool(missing()), reason=missing())

PARAMETERS = {"parameters", "injected-parameters"}  # tags
# Inserted into every question and chain of thought. It must be displayed, never executed or fetched.
HOSTILE = "<script>window.x = 1</script><img src=x onerror='window.x = 1'>"


def write_hostile_sources(folder: Path) -> None:
    demo.make_sources(folder, 100, seed=1)
    for file in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for record in records:
            record["instruction"] += HOSTILE
            record["output"] = record["output"].replace("Start:", f"{HOSTILE} Start:")
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def project_to_sweep(folder: Path, training: dict) -> Path:
    """A project with a training, to be run with two learning rates and two seeds."""
    small = {"nproc": 1, "global_batch_size": 4, "eval_iters": 1, "eval_generate_every": 0}
    training = {name: value for name, value in training.items() if name != "output"} | small
    file = folder / "swept.yaml"
    vary = "{lr: [1e-3, 2e-3], seed: [1, 2]}"
    file.write_text(json.dumps({"05_train": training, "09_sweep": {"vary": vary, "output": str(folder / "sweep")}}))
    return file


WITHOUT_MEGATRON = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name == "megatron.core":
            raise ImportError("a notebook imports megatron-core, which takes many seconds with Transformer Engine")

sys.meta_path.insert(0, Refused())
"""


@pytest.fixture(scope="module", autouse=True)
def kernels_cannot_import_megatron(tmp_path_factory):
    """IPython runs its start-up files in kernels alone, not in the processes that train."""
    folder = tmp_path_factory.mktemp("ipython")
    startup = folder / "profile_default" / "startup" / "refuse.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(WITHOUT_MEGATRON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder))
        yield


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> SimpleNamespace:
    """Notebooks 01 to 10: their `folder`, `given` parameters, `executed` notebooks and `status`."""
    folder = tmp_path_factory.mktemp("steps")
    demo.make_model(folder / "model", seed=1)
    write_hostile_sources(folder / "sources")
    given = chained(folder)
    given["09_sweep"] = {"project": str(project_to_sweep(folder, given["05_train"]))}
    more = f"again -> {given['05_train']['eval_data']}"
    given["05_train"] |= {"save_interval": 3, "keep_best": "eval_again_loss", "eval_more": more, "layout": "auto"}
    given["07_export_and_generate"]["which"] = "best"
    given["10_make_pairs"] = {
        "model": str(folder / "out"), "questions": str(folder / "sources" / "long.jsonl"), "count": 3,
        "evaluation": str(folder / "hybrid" / "heldout.jsonl"), "output": str(folder / "pairs"),
        "samples": 2, "max_new_tokens": 8,
    }  # fmt: skip
    done = {name: run(NOTEBOOKS / f"{name}.ipynb", folder / "executed", given[name]) for name in given}
    executed, status = ({name: result[i] for name, result in done.items()} for i in (0, 1))
    return SimpleNamespace(folder=folder, given=given, executed=executed, status=status)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[Path, Path, dict]:
    """(folder, executed notebook, status) of notebook 00."""
    folder = tmp_path_factory.mktemp("quickstart")
    few = {"output": str(folder), "train_iters": 4, "problems": 300, "nproc": 1}
    return folder, *run(NOTEBOOKS / "00_quickstart.ipynb", folder, few)


def test_the_quickstart_ends_with_a_model_that_answers(quickstart):
    folder, executed, status = quickstart
    assert status == json.loads((folder / "status.json").read_text())
    assert status["scores"].keys() == {"think", "short", "own choice"}
    assert "loss" in status["summary"] and str(folder / "exported") in status["summary"]
    assert AutoModelForCausalLM.from_pretrained(folder / "exported").config.vocab_size == 512
    text = "Ben has two apples.<short>Answer: two"
    patched = AutoTokenizer.from_pretrained(folder / "exported")
    assert patched.decode(patched(text)["input_ids"]) == text
    assert pictures(executed)


def test_the_notebooks_chain_through_their_folders(steps):
    assert {status["status"] for status in steps.status.values()} == {"done"}
    assert steps.status["02_convert_checkpoint"]["differing_tensors"] == []
    assert steps.status["05_train"]["iteration"] == STEPS
    first, middle, last = (evaluated(steps.folder / "run")[step] for step in (0, 3, STEPS))
    assert first["eval_again_loss"] == first["eval_loss"] > last["eval_loss"] and "choice_accuracy_low" in first
    best = 3 if middle["eval_again_loss"] <= last["eval_again_loss"] else STEPS
    assert steps.status["05_train"]["best"].startswith(f"step {best}: eval_again_loss")
    assert own_manifest(steps.folder / "out")["checkpoint"].endswith(f"iter_{best:07d}")
    assert (steps.folder / "curves" / "losses.png").stat().st_size > 10_000
    assert AutoModelForCausalLM.from_pretrained(steps.folder / "out").config.model_type == "qwen2"


def evaluated(run: Path) -> dict[int, dict]:
    """The records of a run by their step, with that before the first."""
    found = scan_metrics(run)
    return {record["iteration"]: record for record in (found.start, *found.records)}


def test_notebook_10_asks_no_held_out_question_and_shows_what_it_left_out(steps):
    counts, held_out = steps.status["10_make_pairs"]["counts"], set()
    for line in (steps.folder / "hybrid" / "heldout.jsonl").read_text().splitlines():
        held_out.add(json.loads(line)["instruction"])
    leaks = [
        json.loads(line) for line in (steps.folder / "pairs" / "questions" / "leaks.jsonl").read_text().splitlines()
    ]
    assert len(leaks) == counts["leaked"] and held_out <= {leak["question"] for leak in leaks}
    assert counts["kept"] == 3 and len(held_out) == counts["evaluation"] == 10
    assert all(leak["text"].lower() in leak["question"].lower() for leak in leaks)


def test_no_cell_writes_to_stderr(steps, quickstart):
    for executed in (quickstart[1], *steps.executed.values()):
        assert [output.text for output in outputs(executed) if output.get("name") == "stderr"] == [], executed.name


def test_rerunning_a_finished_training_changes_nothing(steps):
    config = json.loads((steps.folder / "run" / "config.json").read_text())
    metrics = (steps.folder / "run" / "metrics.jsonl").read_bytes()
    _, again = run(NOTEBOOKS / "05_train.ipynb", steps.folder / "again", config | {"nproc": 2})
    assert again["last_loss"] == steps.status["05_train"]["last_loss"]
    assert (steps.folder / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_failed_run_removes_the_earlier_status(steps):
    folder = steps.folder
    assert (folder / "run" / "status.json").exists()
    given = {"output": str(folder / "run"), "checkpoint": str(folder / "megatron"), "data": str(folder / "nowhere")}
    with pytest.raises(RuntimeError, match="nowhere does not exist"):
        run(NOTEBOOKS / "05_train.ipynb", folder / "failed", given)
    assert not (folder / "run" / "status.json").exists()


@pytest.fixture(scope="module")
def lab(steps, quickstart, tmp_path_factory):
    """JupyterLab on a copy of the project, with the chain's outputs as defaults of notebooks 04, 05 and 08."""
    from playwright.sync_api import sync_playwright

    project, private = copy_project(tmp_path_factory.mktemp("project")), tmp_path_factory.mktemp("private")
    for name, changed in {
        "04_tokenize_and_inspect": {},
        "08_loss_lab": {},
        # So many steps that it only ends if stopped.
        "05_train": {"output": str(project / "stopped"), "train_iters": 100_000},
    }.items():
        set_defaults(project / "notebooks" / f"{name}.ipynb", **steps.given[name] | changed)
    for executed in (quickstart[1], *steps.executed.values()):
        install_trusted(executed, project, private)
    with (
        jupyterlab(project, private) as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as chromium,
    ):
        yield Browser(chromium, address, project)


def assert_nothing_hostile_ran(page) -> None:
    assert page.evaluate("String(window.x)") == "undefined" and page.locator("img[src=x]").count() == 0


@in_browser
@pytest.mark.parametrize(
    ("name", "hostile"),
    [
        ("00_quickstart", False), ("06_loss_curves", False), ("07_export_and_generate", True), ("08_loss_lab", True),
        ("09_sweep", False), ("10_make_pairs", True),
    ],
)  # fmt: skip
def test_an_executed_notebook_shows_its_pictures_and_runs_no_script_of_the_data(lab, steps, quickstart, name, hostile):
    with lab.notebook(f"executed/{name}") as book:
        assert book.count_pictures() == pictures({"00_quickstart": quickstart[1], **steps.executed}[name])
        assert_nothing_hostile_ran(book.page)
        assert not hostile or book.page.get_by_text(HOSTILE).count() > 0


@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_of_every_notebook_is_legible_and_at_home_in_both_themes(lab, steps, quickstart, theme):
    for executed in (quickstart[1], *steps.executed.values()):
        shown = texts(lab.context, executed, theme)
        assert shown and [text for text in shown if text["contrast"] < ENOUGH] == [], executed.name
        assert theme == "light" or [text for text in shown if text["ground"] > 0.5] == [], executed.name


def test_figures_have_no_ground_so_that_they_fit_every_theme(steps, quickstart):
    for executed in (quickstart[1], *steps.executed.values()):
        for output in outputs(executed):
            if picture := output.get("data", {}).get("image/png"):
                pixels = plt.imread(BytesIO(b64decode(picture)))  # [height, width, RGBA]
                assert pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3].max() == 0, executed.name


def test_no_cell_is_empty_headless(steps, quickstart):
    for executed in (quickstart[1], *steps.executed.values()):
        code = [cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"]
        empty = [cell.source for cell in code if not cell.outputs and not PARAMETERS & {*cell.metadata.get("tags", [])}]
        assert empty == [], executed.name


@pytest.fixture(scope="module")
def inspected(lab):
    """Notebook 04, opened and run."""
    with lab.notebook("notebooks/04_tokenize_and_inspect") as book:
        book.run()
        yield book


@in_browser
def test_the_slider_of_the_mask_viewer_changes_the_sample(inspected):
    viewer = inspected.page.locator(".widget-vbox", has=inspected.page.locator(".widget-slider"))
    shown = viewer.locator(".widget-html")
    assert "sample 0 of" in shown.text_content()
    viewer.locator(".widget-slider", has_text="which").locator(".noUi-handle").press("ArrowRight")
    shown.get_by_text("sample 1 of").wait_for()
    viewer.locator("select").select_option("short")
    shown.get_by_text("90 of 180 samples").wait_for()


@in_browser
def test_a_click_on_a_point_of_the_loss_plot_shows_its_sample(lab):
    with lab.notebook("notebooks/08_loss_lab") as book:
        book.run()
        viewer = book.page.locator(".widget-vbox", has=book.page.locator(".widget-image"))
        shown = viewer.locator(".widget-html")
        for number in (7, 100):
            viewer.get_by_title(f"sample {number}", exact=True).click(force=True)  # another button may lie over it
            shown.get_by_text(re.compile(r"sample \d+ of 180: loss")).wait_for()
        assert shown.locator("pre").count() == 4
        assert_nothing_hostile_ran(book.page)


@in_browser
def test_a_script_in_the_data_is_shown_and_not_run(inspected):
    assert inspected.page.locator("pre", has_text=HOSTILE).count() > 0
    assert_nothing_hostile_ran(inspected.page)


@in_browser
def test_the_dashboard_advances_and_its_button_stops_and_saves(lab):
    with lab.notebook("notebooks/05_train") as book:
        book.start()
        board = book.page.locator(".jp-CodeCell", has_text="watch(job)")
        first = step_beyond(board, 0)
        second = step_beyond(board, first)
        book.screenshot("-running")
        board.get_by_role("button", name="Stop and save").click()
        book.wait()
        shown = board.inner_text()
    stopped = lab.project / "stopped"
    checkpoint = newest(stopped)
    assert checkpoint and second <= int(checkpoint.name.removeprefix("iter_")) < 100_000
    assert json.loads((stopped / "ended.json").read_text())["reason"] != "finished"
    assert "Stop and save" not in shown and "saved" in shown


BOX = """
from rsft_lib.display.model.answers import SideBySide
from rsft_lib.display.model.prompt_box import ask_more
from rsft_lib.generation.answer import Answer
from rsft_lib.generation.inference_engines import Sampling

modes = {mode: Answer("", 0, True) for mode in ("think", "short")}
ask_more(SideBySide("2 + 2 ?", modes), MODEL, Sampling(100_000))
"""


@in_browser
def test_both_modes_answer_in_the_prompt_box_until_it_is_stopped(lab, steps):
    """The model was trained for a few steps only and does not end by itself."""
    cell = nbformat.v4.new_code_cell(BOX.replace("MODEL", repr(str(steps.folder / "out"))))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), lab.project / "box.ipynb")
    with lab.notebook("box") as book:
        book.start()
        page, shown = book.page, book.page.locator(".widget-html")
        page.locator("textarea.widget-input, .widget-textarea textarea").fill("3 + 4 ?")
        page.get_by_role("button", name="Answer").click()
        for tokens in (3, 9):
            page.wait_for_function(
                "n => { const found = document.querySelector('.widget-html').innerText.matchAll(/(\\d+) tokens · …/g);"
                " const all = [...found].map(m => Number(m[1])); return all.length == 2 && Math.min(...all) >= n; }",
                arg=tokens,
            )  # fmt: skip
        assert "3 + 4 ?" in shown.inner_text()
        page.get_by_role("button", name="Stop").click()
        page.locator("button:not([disabled])", has_text="Answer").wait_for()
        assert "…" not in shown.inner_text() and "cut off" in shown.inner_text()


def step_beyond(board, step: int) -> int:
    """Wait until the dashboard shows a step beyond `step`, and return it."""
    title = board.locator("b", has_text=re.compile(r"^step [\d,]+ of"))
    for _ in range(5 * PATIENCE):
        if title.count() and (
            now := int(re.search(r"step ([\d,]+) of", title.first.text_content())[1].replace(",", ""))
        ):
            if now > step:
                return now
        board.page.wait_for_timeout(200)
    raise AssertionError(f"the dashboard did not get beyond step {step}: {board.inner_text()}")
