"""JupyterLab in Chromium, for tests that look at notebooks as a person does."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbformat.sign import NotebookNotary

from rsft_lib.common.parent_death import die_with_parent
from rsft_lib.common.paths import ROOT

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = ROOT / "outputs" / "screenshots"
TOKEN = "a-token-of-the-tests"
# Questions that JupyterLab asks whoever opens it first, and the news it would fetch for them.
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
READY = re.compile(r"^Python 3 .*\| Idle$")  # in the status bar; cells that are run before that are lost
PATIENCE = 900  # seconds for whatever must happen; a machine may be busy with something else
TALLEST = 12_000  # pixels of a screenshot
# What is shown last of an executed notebook, and shows that what it holds is run: without it, no script proves nothing.
CANARY = "<img src='data:,' onerror='window.canary = 1'>"
# What may stand in the console as an error or a warning: that JupyterLab took over five seconds for a part of itself.
HARMLESS = ("ms to activate.", "is taking too long to activate.")


def missing() -> str:
    """Why notebooks cannot be opened in a browser here; empty where they can."""
    if not importlib.util.find_spec("playwright"):
        return "playwright is not installed (pip install playwright)"
    return "" if CHROMIUM else "no chromium is on the PATH (apt install chromium)"


def copy_project(folder: Path) -> Path:
    """Library and notebooks as a project of its own, so that what notebooks make by default stays within `folder`."""
    for name in ("rsft_lib", "notebooks"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def set_defaults(notebook: Path, **values) -> None:
    """Give parameters of a notebook other defaults."""
    book = nbformat.read(notebook, 4)
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        line = re.compile(rf"^({name}: \w+ = ).*?(?=  #)", re.MULTILINE)
        cell.source, found = line.subn(lambda begin, value=value: begin[1] + repr(value), cell.source)
        assert found == 1, f"{notebook.name} has no parameter {name}"
    nbformat.write(book, notebook)


def lay_open(executed: Path, project: Path, private: Path) -> str:
    """Lay an executed notebook into `project`, trusted as if it had just been run there: its name for `notebook`."""
    book = nbformat.read(executed, 4)
    book.cells.append(
        nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", {"text/html": CANARY})])
    )
    target = project / "executed" / executed.name
    target.parent.mkdir(exist_ok=True)
    nbformat.write(book, target)
    (private / "data").mkdir(exist_ok=True)
    notary = NotebookNotary(data_dir=str(private / "data"))
    notary.sign(nbformat.read(target, 4))
    notary.store.close()
    return f"executed/{executed.stem}"


@contextmanager
def jupyterlab(project: Path, private: Path) -> Iterator[str]:
    """Serve `project` as `make lab` does: the address. Settings, kernels and history of this user play no part."""
    for name, settings in SETTINGS.items():
        file = private / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings), encoding="utf-8")
    folders = {
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
    }  # fmt: skip
    environment = {name: str(private / folder) for name, folder in folders.items()} | {"PYTHONPATH": str(project)}
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
        f"--ServerApp.root_dir={project}", f"--IdentityProvider.token={TOKEN}",
    ]  # fmt: skip
    with (private / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=project, env=os.environ | environment, stdout=log, stderr=log, preexec_fn=die_with_parent
        )
    try:
        yield _address(server, private)
    finally:
        server.terminate()  # it ends its kernels first
        server.wait(PATIENCE)


def _address(server: subprocess.Popen, private: Path) -> str:
    for _ in range(PATIENCE * 5):
        for file in (private / "runtime").glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text(encoding="utf-8"))["url"]
            except ValueError:  # it is being written
                break
        assert server.poll() is None, (private / "server.log").read_text()
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab is not there:\n{(private / 'server.log').read_text()}")


class Browser:
    """A Chromium and the JupyterLab that serves `project` at `address`."""

    def __init__(self, chromium, address: str, project: Path):
        self.address, self.project = address, project
        self.context = chromium.new_context(
            viewport={"width": 1280, "height": 1000}, extra_http_headers={"Authorization": f"token {TOKEN}"}
        )
        self.context.set_default_timeout(1000 * PATIENCE)

    @contextmanager
    def notebook(self, name: str) -> Iterator["Notebook"]:
        """Open a notebook with a fresh kernel, which ends with it; nothing in the page may have complained."""
        book = Notebook(self.context.new_page(), Path(name).name)
        try:
            book.page.goto(f"{self.address}lab/workspaces/{book.name}/tree/{name}.ipynb?token={TOKEN}")
            book.page.get_by_text(READY).wait_for()
            yield book
            assert not book.complaints, f"{name} in the browser:\n" + "\n".join(book.complaints)
        finally:
            book.keep_picture()
            book.page.close()
            sessions = f"{self.address}api/sessions"
            for session in self.context.request.get(sessions).json():
                if name in session["path"]:
                    self.context.request.delete(f"{sessions}/{session['id']}")


class Notebook:
    """A notebook that is open in a page. `complaints` are errors of the page, of its console and of requests."""

    def __init__(self, page, name: str):
        self.page, self.name, self.complaints = page, name, []
        page.on("pageerror", lambda error: self._hear(f"page: {error}"))
        page.on("console", lambda said: said.type in ("error", "warning") and self._hear(f"console: {said.text}"))
        page.on("response", lambda answer: answer.status >= 400 and self._hear(f"{answer.status}: {answer.url}"))

    def run(self) -> None:
        """Run all cells, and wait until the last has said that it is done."""
        self.start()
        self.wait()

    def start(self) -> None:
        for entry in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=entry, exact=True).click()

    def wait(self) -> None:
        """Wait until the last cell has said that it is done. No cell may fail, or write to stderr."""
        done = self.page.locator(".jp-CodeCell").last.get_by_text(re.compile(r"(done|stopped): \S+status\.json"))
        done.or_(self.output("error")).first.wait_for(state="attached")
        for kind in ("error", "stderr"):
            found = self.output(kind).all_text_contents()
            assert found == [], f"{kind} in {self.name}: {found}"

    def see(self) -> int:
        """Wait until all of an executed notebook is shown: the number of pictures in it."""
        self.stretch()
        self.page.wait_for_function("window.canary")
        pictures = self.page.locator(".jp-OutputArea-output img:not([onerror])")
        return pictures.evaluate_all("all => Promise.all(all.map(one => one.decode())).then(() => all.length)")

    def output(self, kind: str):
        return self.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']")

    def keep_picture(self, moment: str = "") -> None:
        """Keep what the whole notebook looks like."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.stretch()
        self.page.screenshot(path=SCREENSHOTS / f"{self.name}{moment}.png")
        self.page.set_viewport_size({"width": 1280, "height": 1000})

    def stretch(self) -> None:
        """Make the window as tall as the notebook, so that all of it is drawn."""
        height = self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollHeight ?? 0")
        self.page.set_viewport_size({"width": 1280, "height": min(height + 140, TALLEST)})
        self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollTo(0, 0)")

    def _hear(self, text: str) -> None:
        if not any(harmless in text for harmless in HARMLESS):
            self.complaints.append(text)
