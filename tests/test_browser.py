"""The notebooks in JupyterLab, in a real Chromium, as a person runs them: pytest tests/test_browser.py

Screenshots are left in outputs/screenshots.
"""

import json
import re

import pytest
from browser import CHROMIUM, Browser, copy_project, jupyterlab, missing, set_defaults

from rsft_lib import demo
from rsft_lib.artifact import newest

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

# In every question and every thought. None of it may be run, fetched or swallowed.
HOSTILE = "<script>window.x = 1</script><img src=x onerror='window.x = 1'>"
X = "String(window.x)"


def write_hostile_sources(folder):
    demo.make_sources(folder, 100, seed=1)
    for file in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for record in records:
            record["instruction"] += HOSTILE
            record["output"] = record["output"].replace("Start:", f"{HOSTILE} Start:")
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the project. The notebooks have their defaults, but for what keeps them short."""
    from playwright.sync_api import sync_playwright

    project = copy_project(tmp_path_factory.mktemp("project"))
    write_hostile_sources(project / "assets" / "sources")
    sources = {name: f"assets/sources/{name}.jsonl" for name in ("long", "short")}
    for name, changed in {
        "00_quickstart": {"train_iters": 4, "problems": 100},
        "03_build_dataset": sources,
        "07_export_and_generate": {"questions": 4, "max_new_tokens": 8, "verify": False},
        "08_loss_lab": {"nproc": 1},
    }.items():
        set_defaults(project / "notebooks" / f"{name}.ipynb", **changed)
    with (
        jupyterlab(project, tmp_path_factory.mktemp("private")) as address,
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as chromium,
    ):
        yield Browser(chromium, address, project)


@pytest.fixture(scope="module")
def dataset(lab):
    """What notebooks 01 to 03 make."""
    for name in ("01_patch_tokenizer", "02_convert_checkpoint", "03_build_dataset"):
        with lab.notebook(name) as book:
            book.run()
            assert book.page.evaluate(X) == "undefined"


@pytest.fixture(scope="module")
def inspected(lab, dataset):
    """Notebook 04, open and run."""
    with lab.notebook("04_tokenize_and_inspect") as book:
        book.run()
        yield book


def test_the_quickstart_runs_to_its_end(lab):
    with lab.notebook("00_quickstart") as book:
        book.run()


def test_the_slider_of_the_mask_viewer_changes_the_sample(inspected):
    viewer = inspected.page.locator(".widget-vbox", has=inspected.page.locator(".widget-slider"))
    shown = viewer.locator(".widget-html")
    assert "sample 0 of" in shown.text_content()
    viewer.locator(".widget-slider", has_text="which").locator(".noUi-handle").press("ArrowRight")
    shown.get_by_text("sample 1 of").wait_for()
    viewer.locator("select").select_option("short")
    shown.get_by_text("90 of 180 samples").wait_for()


def test_a_script_in_the_data_is_shown_and_not_run(inspected):
    assert inspected.page.locator("pre", has_text=HOSTILE).count() > 0
    assert inspected.page.locator("img[src=x]").count() == 0
    assert inspected.page.evaluate(X) == "undefined"


@pytest.fixture(scope="module")
def stopped(lab, inspected):
    """A training that was begun in notebook 05 and ended with the button: its run folder, and the steps seen."""
    with lab.notebook("05_train") as book:
        book.start()
        board = book.page.locator(".jp-CodeCell", has_text="watch(job)")
        first = step_beyond(board, 0)
        second = step_beyond(board, first)
        book.keep_picture("-running")
        board.get_by_role("button", name="Stop and save").click()
        book.wait()
        ended = board.inner_text()
    return lab.project / "outputs" / "checkpoints" / "tiny", (first, second), ended


def step_beyond(board, step: int) -> int:
    """The step that the dashboard tells, once it is beyond `step`."""
    told = board.locator("b", has_text=re.compile(r"^step [\d,]+ of"))
    for _ in range(600):
        if told.count() and (now := int(re.search(r"step ([\d,]+) of", told.first.text_content())[1])) > step:
            return now
        board.page.wait_for_timeout(200)
    raise AssertionError(f"the dashboard did not come beyond step {step}: {board.inner_text()}")


def test_the_dashboard_moves_and_its_button_stops_and_saves(stopped):
    run, (first, second), ended = stopped
    assert 0 < first < second < 500
    checkpoint = newest(run)
    assert checkpoint and second <= int(checkpoint.name.removeprefix("iter_")) < 500
    assert json.loads((run / "ended.json").read_text())["reason"] != "finished"
    assert "Stop and save" not in ended and "saved" in ended


@pytest.mark.parametrize("name", ["06_loss_curves", "07_export_and_generate", "08_loss_lab"])
def test_what_comes_after_the_training_runs(lab, stopped, name):
    with lab.notebook(name) as book:
        book.run()
        assert book.page.evaluate(X) == "undefined"
        assert book.page.locator("img[src=x]").count() == 0
