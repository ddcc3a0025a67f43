"""Contrast of the text in the outputs of executed notebooks, in JupyterLab's light and dark theme."""

import re
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ENOUGH = 4.5  # of WCAG 2.2, level AA, for text of normal size: https://www.w3.org/TR/WCAG22/#contrast-minimum

THEMES = (("#ffffff", "#212121"), ("#111111", "#e0e0e0"))  # ground and text of JupyterLab, light and dark

# Every piece of text in an output with its contrast, as WCAG defines it, and the luminance of the ground behind it.
TEXTS = """
() => {
  const parse = (color) => { const c = color.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
  const over = (top, below) => {
    const alpha = top[3] + below[3] * (1 - top[3]);
    const mixed = (i) => (top[i] * top[3] + below[i] * below[3] * (1 - top[3])) / (alpha || 1);
    return [mixed(0), mixed(1), mixed(2), alpha];
  };
  const seen = (color, element) => {  // through the grounds and opacities of all elements around it
    for (let e = element; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      color = over(color, parse(style.backgroundColor));
      color[3] *= style.opacity;
    }
    return over(color, [255, 255, 255, 1]);
  };
  const light = (rgb) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = [];
  for (const output of document.querySelectorAll('.jp-OutputArea-output')) {
    for (const details of output.querySelectorAll('details')) details.open = true;
    const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const element = node.parentElement, text = node.textContent.trim();
      if (!text || element.closest('style, script, svg') || !element.getClientRects().length) continue;
      const color = parse(getComputedStyle(element).color);
      const ground = light(seen([0, 0, 0, 0], element)), ink = light(seen(color, element));
      const [high, low] = [ink, ground].sort((a, b) => b - a), contrast = (high + 0.05) / (low + 0.05);
      texts.push({text: text.slice(0, 60), tag: element.tagName, contrast, ground});
    }
  }
  return texts;
}
"""


def texts(context, executed: Path, theme: str) -> list[dict]:
    """The texts in the outputs of a notebook in a theme of JupyterLab: each with its `contrast`, 1 to 21, and the
    luminance of its `ground`, 0 to 1.
    """
    body, _ = HTMLExporter(template_name="lab", theme=theme).from_notebook_node(nbformat.read(executed, 4))
    page = context.new_page()
    page.set_content(body)
    try:
        return page.evaluate(TEXTS)
    finally:
        page.close()


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in parsed(color))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(*colors: str) -> float:
    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


def over(style: str, ground: str) -> str:
    """The colour of `ground` under a style with a background."""
    if solid := re.search("background:(#[0-9a-f]{6})", style):
        return solid[1]
    *color, share = map(float, re.findall(r"[\d.]+", style)) if style else (0, 0, 0, 0)
    mixed = [round(c * share + below * (1 - share)) for c, below in zip(color, parsed(ground), strict=True)]
    return f"#{bytes(mixed).hex()}"


def parsed(color: str) -> bytes:
    return bytes.fromhex(color[1:])
