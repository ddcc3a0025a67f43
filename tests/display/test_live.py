"""The live dashboard, with a stand-in for the training and real kernels."""

import json
import re
import time
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient
from standin import Job, ended_job, record
from support import TESTS
from traitlets.config import Config

from rsft_lib.display.live.live import LINES, LiveRun
from rsft_lib.display.live.metrics_tail import Follower
from rsft_lib.display.live.run_card import LOG_LINES, Card, duration, log_end, plot_live
from rsft_lib.display.metric_styles import CHOICES, LOSSES
from rsft_lib.generation.answer import Answer
from rsft_lib.generation.answer_files import write_answers
from rsft_lib.generation.questions import Question
from rsft_lib.notebook import kernel_options


def watching(folder: Path, **job) -> str:
    """The source of a cell that watches a stand-in."""
    arguments = "".join(f", {name}={value!r}" for name, value in job.items())
    return (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from standin import Job\nfrom rsft_lib.display.live.live import watch\n"
        f"watch(Job({str(folder)!r}{arguments}))"
    )


def executed(source: str) -> nbformat.NotebookNode:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    return NotebookClient(book, timeout=300, config=Config({"KernelManager": kernel_options()})).execute()


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A headless notebook that watched 100,000 steps and a log of 100 MB."""
    folder = tmp_path_factory.mktemp("long")
    end = "<script>alert(1)</script>\\n\\x1b[31mred\\x1b[0m 50%\\r99%\\n"
    log = f"('x' * 99 + '\\n') * 1_000_000 + 'z' * 100_000 + '\\n{end}'"
    source = watching(folder, train_iters=100_000, steps=2_000).replace("steps=", f"log={log}, steps=")
    return executed(source), folder


def test_a_long_headless_run_leaves_a_card_a_plot_and_a_few_lines(long):
    book, folder = long
    outputs = book.cells[0].outputs
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert [next(iter(data)) for data in shown] == ["text/html", "image/png"]
    assert "widget" not in json.dumps(book)
    printed = "".join(output.text for output in outputs if output.output_type == "stream").splitlines()
    assert 2 < len(list(filter(None, printed))) <= LINES + 2 and printed[-1].startswith("step 100,000/100,000")
    assert (folder / "train.log").stat().st_size > 100_000_000
    assert len(json.dumps(outputs)) < 300_000 and len(shown[0]["text/html"]) < 5_000


def test_the_end_of_the_log_is_shown_as_a_terminal_would(long):
    card = long[0].cells[0].outputs[0].data["text/html"]
    assert "<script" not in card and "\x1b" not in card
    assert "\n&lt;script&gt;alert(1)&lt;/script&gt;\n" in card and "red" not in card
    assert card.count("z") < 200 and "\n99%</pre>" in card


def test_the_card_shows_how_the_run_ended(long):
    assert "step 100,000 of 100,000 · 100.0% · finished" in long[0].cells[0].outputs[0].data["text/plain"]


def test_the_newest_answers_to_held_out_questions_are_shown(tmp_path):
    questions = [
        Question([{"role": "user", "content": text}], None, "4") for text in ("2 + 2 ?", "<b>1 + 3</b> ?", "x")
    ]
    for step, text in ((2, "early"), (11, "Answer: 4")):
        answers = {
            "think": [Answer(f"<think>\nhm\n</think>\n\n{text}", 9, True)] * 3,
            "short": [Answer(f"<short>{text}", 3, False)] * 3,
            None: [Answer(f"<short>{text}", 3, True)] * 3,
        }
        write_answers(tmp_path, step, questions, answers)
    scores = {
        "accuracy": 0.25, "accuracy_low": 0.06, "accuracy_high": 0.61, "well_formed": 0.5, "tokens": 9.5, "cut_off": 1,
        "loops": 0.125, "thinks": 0.375, "shorts": 0.625,
    }  # fmt: skip
    metrics = record(1, 1) | {"questions": 3} | {f"choice_{name}": value for name, value in scores.items()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    book = executed(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from pathlib import Path\nfrom standin import ended_job\nfrom rsft_lib.display.live.live import LiveRun\n"
        f"LiveRun(ended_job(Path({str(tmp_path)!r}), 1)).end()"
    )
    shown = [output.data for output in book.cells[0].outputs if output.output_type == "display_data"]
    (answers,) = [data for data in shown if "answered after step 11" in data["text/plain"]]
    assert "early" not in answers["text/html"] and "&lt;b&gt;1 + 3" in answers["text/html"]
    assert "expected: 4" in answers["text/plain"] and answers["text/plain"].count("question: ") == 2
    assert "cut off" in answers["text/plain"] and "✓ correct" in answers["text/plain"]
    table = ("own choice", "25.0%", "6% to 61%", "50.0%", "1", "12.5%", "9.5", "37.5%", "62.5%")
    assert re.search(r"\s{2,}".join(map(re.escape, table)), answers["text/plain"]), answers["text/plain"]
    assert "own choice correct 25.0%" in shown[0]["text/plain"]


class Kernel:
    """A kernel, and a front end that sends the cell id, as JupyterLab does."""

    def __init__(self):
        self.manager = KernelManager(**kernel_options())
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, source: str) -> str:
        session, content = self.client.session, {"code": source, "silent": False, "allow_stdin": False}
        message = session.msg("execute_request", content, metadata={"cellId": "the-cell"})
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def subshell(self) -> str:
        self.client.control_channel.send(self.client.session.msg("create_subshell_request", {}))
        return self.client.get_control_msg(timeout=120)["content"]["subshell_id"]

    def click(self, button: str, subshell: str | None) -> None:
        content = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
        message = self.client.session.msg("comm_msg", content)
        message["header"]["subshell_id"] = subshell
        self.client.shell_channel.send(message)

    def outputs(self, request: str) -> list[dict]:
        """Messages that the kernel published for a request, up to its end."""
        published = []
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") == request:
                published.append(message)
                if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                    return published


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.client.stop_channels()
    kernel.manager.shutdown_kernel(now=True)


def wait_for(path: Path, seconds: float = 120) -> str:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name}: not within {seconds} s"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize("through", ["its own subshell, as JupyterLab sends it", "the main shell, as others do"])
def test_a_click_on_the_button_stops_the_job_while_the_cell_waits(kernel, tmp_path, through):
    subshell = kernel.subshell() if "subshell" in through else None
    request = kernel.run(watching(tmp_path, train_iters=100_000, pause=0.02))
    kernel.click(wait_for(tmp_path / "button"), subshell)
    later = kernel.run("print('the next cell')")  # arrives while the first cell runs
    published = kernel.outputs(request)
    assert json.loads((tmp_path / "ended.json").read_text())["reason"] == "SIGTERM"
    updates = [m["content"]["data"] for m in published if m["msg_type"] == "update_display_data"]
    cards = [data["text/plain"] for data in updates if "text/html" in data]
    shown = [m["content"]["data"]["text/plain"] for m in published if m["msg_type"] == "display_data"]
    assert "training starts (waits in the queue)" in shown
    assert "stopped by you and saved; run again to resume" in cards[-1]
    assert not [m for m in published if m["msg_type"] == "stream"], "interactive: no lines are printed"
    assert "comm_close" in {m["msg_type"] for m in published}, "the button is removed"
    assert "the next cell" in str(kernel.outputs(later))


def test_stopping_interactively_ends_without_an_error(kernel, tmp_path):
    finish = f"""
from pathlib import Path
from types import SimpleNamespace
from rsft_lib import notebook
p = SimpleNamespace(folder=Path({str(tmp_path)!r}), record={{"parameters": {{}}, "inputs": {{}}}})
notebook.finish(p, status='stopped', hint='run again')
"""
    published = kernel.outputs(kernel.run(finish))
    (shown,) = (m["content"]["data"]["text/plain"] for m in published if m["msg_type"] == "display_data")
    assert shown.startswith("run again\nstopped: ") and "error" not in {m["msg_type"] for m in published}


def test_an_interrupt_reaches_the_job(kernel, tmp_path):
    request = kernel.run(watching(tmp_path, train_iters=100_000, pause=0.02))
    wait_for(tmp_path / "button")
    kernel.manager.interrupt_kernel()
    kernel.outputs(request)
    assert (tmp_path / "interrupted").exists()


def test_the_error_of_the_job_is_raised_after_the_last_card(tmp_path):
    with pytest.raises(Exception, match="a rank failed"):
        executed(watching(tmp_path, train_iters=5, fail="a rank failed"))


def test_an_error_in_the_display_does_not_stop_the_training(tmp_path, capsys):
    job = Job(tmp_path, 3)
    job.tail = lambda lines: 1 / 0
    live = LiveRun(job)
    live.run.read = lambda: 1 / 0
    job.wait(live.poll)
    assert capsys.readouterr().out.count("the dashboard failed (ZeroDivisionError") == 1
    assert json.loads((tmp_path / "ended.json").read_text())["reason"] == "finished"


def write(path: Path, text: str, how: str = "a") -> None:
    with path.open(how) as file:
        file.write(text)


def test_a_growing_file_is_read_once_and_again_if_replaced(tmp_path):
    run, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    assert not run.read()
    lines = [json.dumps({"iteration": i, "loss": i / 10, "eval_loss": None}) + "\n" for i in range(1, 6)]
    write(path, lines[0] + lines[1][:9])
    assert run.read() and run.last["iteration"] == 1 and not run.read()
    write(path, lines[1][9:] + lines[2])
    assert run.read() and list(run.lines["loss"][0]) == [1, 2, 3] and not run.lines["eval_loss"][0]
    write(tmp_path / "new", lines[0] + lines[3] + lines[4], "w")
    (tmp_path / "new").replace(path)
    assert run.read() and list(run.lines["loss"][1]) == [0.1, 0.4, 0.5]


def test_the_startup_of_a_resumed_run_does_not_count_towards_its_speed(tmp_path, capsys, monkeypatch):
    clock, path = [0.0], tmp_path / "metrics.jsonl"
    monkeypatch.setattr("rsft_lib.display.live.live.time.monotonic", lambda: clock[0])
    lines = [json.dumps(record(step, 12)) + "\n" for step in range(1, 13)]
    write(path, "".join(lines[:6]))
    live = LiveRun(ended_job(tmp_path, 12, state="waits"))
    for count in (6, 4, 5, 6, 7):  # as left by the earlier run, cut back to the checkpoint, then step by step
        write(tmp_path / "new", "".join(lines[:count]), "w")
        (tmp_path / "new").replace(path)
        live.poll()
        assert live.state == ("training" if count > 4 and clock[0] else "training starts"), count
        clock[0] += 2 if clock[0] else 600
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["6/12", "7/12"]
    assert printed[0].endswith("3 s left")  # before the first step, 6 steps at the 0.5 seconds of the earlier run
    assert printed[-1].endswith("10 s left")  # 5 steps at 2 seconds, not at the 600 before the first
    assert "training starts (waits)" in repr(LiveRun(live.job)._card())


def test_many_alarms_are_counted_and_the_last_are_shown(tmp_path):
    run = Follower(tmp_path)
    for step in range(1, 101):
        write(tmp_path / "metrics.jsonl", json.dumps({"iteration": step, "loss": 1.0, "alarms": ["<b>spike"]}) + "\n")
    run.read()
    card = Card({"iteration": 100, "loss": 1.0}, 200, "training", 90.0, list(run.alarms), run.alarm_count)
    assert "97 earlier alarms" in card._repr_html_() and "step 100: &lt;b&gt;spike" in card._repr_html_()
    assert "<b>spike" not in card._repr_html_()
    assert "about 1 min 30 s left" in repr(card) and repr(card).count("ALARM") == 3


def test_a_metric_missing_from_the_last_step_keeps_its_last_value(tmp_path):
    lines = [{"iteration": 1, "loss": 2.0, "loss_mode_think": 1.5, "eval_loss": 3.25}, {"iteration": 2, "loss": 1.0}]
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run = Follower(tmp_path)
    run.read()
    assert Card(run.last, 2, "training").facts() == {"loss": "1.000", "<think>": "1.500", "held-out": "3.250"}


def test_the_number_of_printed_lines_and_alarms_is_bounded(tmp_path, capsys):
    live = LiveRun(ended_job(tmp_path, 1000))
    for step in range(1, 1001):
        line = {**record(step, 1000), "alarms": [f"spike {step}"]}
        write(tmp_path / "metrics.jsonl", json.dumps(line) + "\n")
        live.poll()
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("ALARM: step")]) == LINES
    assert LINES <= len([line for line in printed if line.startswith("step")]) <= LINES + 2


def test_the_plot_has_a_line_for_each_mode_and_keeps_a_spike(tmp_path):
    lines = [record(step, 50_000) for step in range(1, 50_001)]
    lines[33_333]["loss"] = 40.0
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run = Follower(tmp_path)
    run.read()
    losses, choices = plot_live(run, 50_000).axes
    assert [t.get_text() for t in losses.get_legend().get_texts()] == ["<think>", "<short>", "all", "held-out"]
    assert len(choices.lines) == 3
    assert max(max(line.get_ydata()) for line in losses.lines) == 40.0
    assert all(len(line.get_xdata()) <= 1000 for line in losses.lines)


def test_every_metric_of_a_panel_is_read():
    assert set(Follower("anywhere").lines) == {*LOSSES, *CHOICES, "eval_loss"}


def test_a_log_is_limited_in_lines_and_width():
    shown = log_end("old\n" * 50 + "w" * 10_000 + "\na\tb\x00\n")
    assert len(shown.splitlines()) == LOG_LINES and max(map(len, shown.splitlines())) <= 160
    assert "a⇥b␀" in shown


def test_durations_are_human_readable():
    assert [duration(s) for s in (0.4, 59, 61, 3725, 90_000)] == [
        "0 s", "59 s", "1 min 01 s", "1 h 02 min", "1 d 01 h",
    ]  # fmt: skip
