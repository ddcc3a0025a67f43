"""The pictures of the README, from the output of `make demo`: python benchmarks/pictures.py at the project root.

Needs Chromium, a font with the character "｜" such as Noto CJK, and `pip install -e '.[dev]'`.
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from rsft_lib.common.paths import project_root, require_path
from rsft_lib.data.store import TokenStore
from rsft_lib.display.mask.sample import show_sample
from rsft_lib.display.runs.compare_runs import plot_modes
from rsft_lib.display.runs.runs import find_runs
from rsft_lib.tokenizer.patch import load_tokenizer

IMAGES = project_root() / "notebooks" / "images"
FONTS = "font-family:system-ui,DejaVu Sans,sans-serif"


def small(png: bytes, path: Path) -> None:
    """Save a picture with 64 colours, and print its size."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def mask(demo: Path) -> bytes:
    """The first sample of each mode in the mask viewer, rendered by Chromium."""
    store, tokenizer = TokenStore(demo / "tokens-train"), load_tokenizer(demo / "tokenizer")
    first = {}
    for view in (show_sample(store, number, tokenizer) for number in range(50)):
        first.setdefault(view.mode, view)
    shown = "".join(f"<div style='margin-bottom:8px'>{first[mode]._repr_html_()}</div>" for mode in ("think", "short"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 900, "height": 700}, device_scale_factor=1.5)
        page.set_content(f"<body style='margin:0;{FONTS}'><div id=shown style='padding:1px'>{shown}</div>")
        return page.locator("#shown").screenshot()


def curves(demo: Path) -> bytes:
    file = io.BytesIO()
    plot_modes(find_runs(str(demo / "run")), "step", 0.9).savefig(file, format="png", dpi=100)
    return file.getvalue()


if __name__ == "__main__":
    made = require_path("outputs/quickstart", "output of `make demo`")
    IMAGES.mkdir(exist_ok=True)
    small(mask(made), IMAGES / "mask.png")
    small(curves(made), IMAGES / "curves.png")
