"""Seconds that the imports of each notebook take, each in a new process: python benchmarks/imports.py

Beside them those of the libraries alone. All are imported once before, so that their files are in memory.
"""

import ast
import subprocess
import sys
import time
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LIBRARIES = ("transformers", "torch", "transformer_engine.pytorch", "megatron.core")


def imports(notebook: Path) -> str:
    """The import statements of a notebook."""
    cells = [cell.source for cell in nbformat.read(notebook, 4).cells if cell.cell_type == "code"]
    nodes = [node for source in cells for node in ast.parse(source).body]
    return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))


def seconds(source: str) -> float:
    """The time of a Python process, without that of an empty one; not a number if it fails."""
    times = []
    for code in ("", source):
        began = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", code], cwd=NOTEBOOKS, capture_output=True, check=False)
        times.append(time.perf_counter() - began if ended.returncode == 0 else float("nan"))
    return times[1] - times[0]


def main() -> None:
    timed = {path.stem: imports(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    timed |= {name: f"import {name}" for name in LIBRARIES}
    for source in timed.values():
        seconds(source)
    for name, source in timed.items():
        print(f"{name:28}{seconds(source):6.1f} s", flush=True)


if __name__ == "__main__":
    main()
