"""Contrast of the text in the outputs of executed notebooks, in JupyterLab's light and dark theme."""

from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ENOUGH = 4.5  # of WCAG 2.2, level AA, for text of normal size: https://www.w3.org/TR/WCAG22/#contrast-minimum

# Every piece of text in an output with its contrast, as WCAG defines it, against the backgrounds below it.
TEXTS = """
() => {
  const parse = (color) => { const c = color.match(/[\\d.]+/g).map(Number); return c.length > 3 ? c : [...c, 1]; };
  const over = (top, below) => top.slice(0, 3).map((value, i) => value * top[3] + below[i] * (1 - top[3]));
  const background = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = [];
  for (const output of document.querySelectorAll('.jp-OutputArea-output')) {
    for (const details of output.querySelectorAll('details')) details.open = true;
    const walker = document.createTreeWalker(output, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const element = node.parentElement, text = node.textContent.trim();
      if (!text || element.closest('style, script, svg') || !element.getClientRects().length) continue;
      const below = background(element), ink = over(parse(getComputedStyle(element).color), below);
      const [high, low] = [light(ink), light(below)].sort((a, b) => b - a);
      texts.push({text: text.slice(0, 60), tag: element.tagName, contrast: (high + 0.05) / (low + 0.05)});
    }
  }
  return texts;
}
"""


def texts(context, executed: Path, theme: str) -> list[dict]:
    """The texts in the outputs of a notebook, each with its contrast (1 to 21), in a theme of JupyterLab."""
    body, _ = HTMLExporter(template_name="lab", theme=theme).from_notebook_node(nbformat.read(executed, 4))
    page = context.new_page()
    page.set_content(body)
    try:
        return page.evaluate(TEXTS)
    finally:
        page.close()
