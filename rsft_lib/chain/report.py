"""One HTML page of a project: the outputs of the cells tagged `report` in its executed notebooks."""

import html
from collections.abc import Iterator
from pathlib import Path

from rsft_lib.chain.project_file import NOTEBOOKS, Project
from rsft_lib.common.temporary import new_file

TAG, PAGE = "report", "report.html"
STYLE = (
    "body{max-width:1100px;margin:2em auto;padding:0 1em;font:15px/1.5 sans-serif;background:#ffffff;color:#1f2328}"
    "img{max-width:100%}pre{white-space:pre-wrap;overflow-wrap:anywhere}section{overflow-x:auto}"
)


def write_report(project: Project, states: str, executed: Path) -> Path:
    """Write `report.html` beside the executed notebooks.

    Args:
        states: HTML of the notebooks' states.
    """
    parts = [f"<h1>{html.escape(project.name)}</h1>", states, _code(project.file.read_text(encoding="utf-8"))]
    for name in NOTEBOOKS:
        if (executed / f"{name}.ipynb").is_file():
            parts += [f"<h2>{name}</h2>", *_sections(executed / f"{name}.ipynb")]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(project.name)}</title>"
    with new_file(executed / PAGE) as file:
        file.write(f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n")
    return executed / PAGE


def _sections(notebook: Path) -> Iterator[str]:
    """The tagged cells' outputs, each below the last heading before it."""
    import nbformat  # slow

    heading = ""
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            heading = next((line[3:] for line in cell.source.splitlines() if line.startswith("## ")), heading)
        elif TAG in cell.metadata.get("tags", []):
            shown = "".join(map(_output, cell.outputs)) or "<p>not run</p>"
            yield f"<section><h3>{html.escape(heading)}</h3>{shown}</section>"
            heading = ""


def _output(output) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"<p><img alt='figure' src='data:image/png;base64,{data['image/png'].strip()}'></p>"
    if "text/html" in data:  # the kit's own tables and views, which escape what they show of the data
        return f"<div>{data['text/html']}</div>"
    if output.output_type == "error":
        return _code(f"{output.ename}: {output.evalue}")
    return _code(output.get("text") or data.get("text/plain", ""))


def _code(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>" if text else ""
