"""JupyterLab in Chromium, for tests of notebooks as a user sees them."""

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
from support import ROOT

from rsft_lib.common.parent_death import die_with_parent

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = ROOT / "outputs" / "screenshots"
TOKEN = "a-token-of-the-tests"
# Disable the prompt about news on first start, and the update check.
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}}
READY = re.compile(r"^Python 3 .*\| Idle$")  # in the status bar; cells run earlier are lost
PATIENCE = 900  # timeout in seconds; the machine may be busy
TALLEST = 12_000  # pixels of a screenshot
# Appended to executed notebooks. It proves that scripts could run, else a test that none did would prove nothing.
CANARY = "<img src='data:,' onerror='window.canary = 1'>"
# Console messages to ignore: JupyterLab extensions that activate slowly.
HARMLESS = ("ms to activate.", "is taking too long to activate.")


def missing() -> str:
    """Why no browser is available; empty if one is."""
    if not importlib.util.find_spec("playwright"):
        return "playwright is not installed (pip install playwright)"
    return "" if CHROMIUM else "chromium is not on the PATH (apt install chromium)"


def copy_project(folder: Path) -> Path:
    """Copy library, notebooks and projects to `folder`, a git repository: outputs stay in it, and edits are seen."""
    for name in ("rsft_lib", "notebooks", "projects"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    somebody = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    for command in (["init", "-q"], ["add", "."], [*somebody, "commit", "-qm", "copied"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def set_defaults(notebook: Path, **values) -> None:
    """Change the defaults of a notebook's parameters."""
    book = nbformat.read(notebook, 4)
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in values.items():
        line = re.compile(rf"^({name}: \w+ = ).*?(?=  #)", re.MULTILINE)
        cell.source, replaced = line.subn(lambda begin, value=value: begin[1] + repr(value), cell.source)
        assert replaced == 1, f"{notebook.name} has no parameter {name}"
    nbformat.write(book, notebook)


def install_trusted(executed: Path, project: Path, private: Path) -> str:
    """Copy an executed notebook into `project` and mark it as trusted; returns its name for `Browser.notebook`."""
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
    """Serve `project` as `make lab` does, isolated from the user's settings and kernels; yields the address."""
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
        server.terminate()  # it shuts its kernels down first
        server.wait(PATIENCE)


def _address(server: subprocess.Popen, private: Path) -> str:
    for _ in range(PATIENCE * 5):
        for file in (private / "runtime").glob("jpserver-*.json"):
            try:
                return json.loads(file.read_text(encoding="utf-8"))["url"]
            except ValueError:  # partially written
                break
        assert server.poll() is None, (private / "server.log").read_text()
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start:\n{(private / 'server.log').read_text()}")


class Browser:
    """A Chromium browser, and the JupyterLab that serves `project` at `address`."""

    def __init__(self, chromium, address: str, project: Path):
        self.address, self.project = address, project
        self.context = chromium.new_context(
            viewport={"width": 1280, "height": 1000}, extra_http_headers={"Authorization": f"token {TOKEN}"}
        )
        self.context.set_default_timeout(1000 * PATIENCE)

    @contextmanager
    def notebook(self, name: str) -> Iterator["Notebook"]:
        """Open a notebook with a fresh kernel, which is shut down at the end; fails on any error of the page."""
        book = Notebook(self.context.new_page(), Path(name).name)
        try:
            book.page.goto(f"{self.address}lab/workspaces/{book.name}/tree/{name}.ipynb?token={TOKEN}")
            book.page.get_by_text(READY).wait_for()
            yield book
            assert not book.errors, f"{name} in the browser:\n" + "\n".join(book.errors)
        finally:
            book.screenshot()
            book.page.close()
            sessions = f"{self.address}api/sessions"
            for session in self.context.request.get(sessions).json():
                if name in session["path"]:
                    self.context.request.delete(f"{sessions}/{session['id']}")


class Notebook:
    """An open notebook. `errors` collects errors of the page, its console and its requests."""

    def __init__(self, page, name: str):
        self.page, self.name, self.errors = page, name, []
        page.on("pageerror", lambda error: self._add_error(f"page: {error}"))
        page.on(
            "console",
            lambda message: message.type in ("error", "warning") and self._add_error(f"console: {message.text}"),
        )
        page.on("response", lambda reply: reply.status >= 400 and self._add_error(f"{reply.status}: {reply.url}"))

    def run(self) -> None:
        """Run all cells, and wait until the last one has finished."""
        self.start()
        self.wait()

    def start(self) -> None:
        for entry in ("Run", "Run All Cells"):
            self.page.get_by_role("menuitem", name=entry, exact=True).click()

    def wait(self) -> None:
        """Wait until the last cell reports its status. No cell may fail or write to stderr."""
        done = self.page.locator(".jp-CodeCell").last.get_by_text(re.compile(r"(done|stopped): \S+status\.json"))
        done.or_(self.output("error")).first.wait_for(state="attached")
        for kind in ("error", "stderr"):
            texts = self.output(kind).all_text_contents()
            assert texts == [], f"{kind} in {self.name}: {texts}"

    def count_pictures(self) -> int:
        """Wait until all of an executed notebook is rendered; returns its number of pictures."""
        self.stretch()
        self.page.wait_for_function("window.canary")
        pictures = self.page.locator(".jp-OutputArea-output img:not([onerror])")
        return pictures.evaluate_all("all => Promise.all(all.map(one => one.decode())).then(() => all.length)")

    def output(self, kind: str):
        return self.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']")

    def screenshot(self, suffix: str = "") -> None:
        """Save a screenshot of the whole notebook."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.stretch()
        self.page.screenshot(path=SCREENSHOTS / f"{self.name}{suffix}.png")
        self.page.set_viewport_size({"width": 1280, "height": 1000})

    def stretch(self) -> None:
        """Make the window as tall as the notebook, so that all of it is rendered."""
        height = self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollHeight ?? 0")
        self.page.set_viewport_size({"width": 1280, "height": min(height + 140, TALLEST)})
        self.page.evaluate("document.querySelector('.jp-WindowedPanel-outer')?.scrollTo(0, 0)")

    def _add_error(self, text: str) -> None:
        if not any(pattern in text for pattern in HARMLESS):
            self.errors.append(text)
