"""Tables and plots of a hybrid dataset: origin of the samples, balance of the modes, findings."""

import json
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rsft_lib.common.paths import resolve
from rsft_lib.data.hybrid import FINDINGS
from rsft_lib.data.records import read_records
from rsft_lib.display.html import Table, one_line
from rsft_lib.display.plot_style import finished
from rsft_lib.display.stacked_bars import draw_bars

CHARACTERS = 60  # shown of a text


def balance_table(built: dict) -> Table:
    """Samples and lengths by split and mode, from the manifest of `build_hybrid`."""
    unit, rows = built["unit"], []
    for split, modes in built["balance"].items():
        total = sum(mode["answer"] for mode in modes.values())
        for mode, n in modes.items():
            mean = round(n["answer"] / n["samples"]) if n["samples"] else 0
            rows.append((split, mode, n["samples"], n["choices"], n["prompt"], n["answer"], mean, n["answer"] / total))
    columns = (
        "split", "mode", "samples", "choices", f"prompt {unit}", f"answer {unit}", f"{unit} per answer",
        f"share of answer {unit}",
    )  # fmt: skip
    return Table("balance", columns, rows)


def origin_table(built: dict) -> Table:
    """How many records were kept or dropped, and in which modes the problems are answered."""
    records = built["records"]
    names = {
        "both": "problems answered in both modes", "think_only": "problems answered with <think> only",
        "short_only": "problems answered with <short> only", "other": "problems, all without control tokens",
    }  # fmt: skip
    rows = [
        ("records read", records["read"]),
        ("- rejected", records["rejected"]),
        ("- dropped: final answers disagree", records["disagreeing"]),
        ("+ short answers extracted from long ones", records["cut"]),
        ("= samples", sum(mode["samples"] for modes in built["balance"].values() for mode in modes.values())),
        *((names[modes], count) for modes, count in built["problems"].items()),
        *((f"finding: {what}", count) for what, count in built["findings"].items()),
    ]
    return Table("origin of the samples", ("", "count"), rows, _unpaired(built["problems"]))


def budgets_table(built: dict) -> Table:
    """How many long answers of the training split were cut at a budget; empty without budgets or long answers."""
    found, budgets = built.get("thoughts_cut", {}), built.get("budgets")
    if not budgets or not found["long"]:
        return Table("no thinking budgets: all thoughts are whole", (), [])
    most = f"{budgets['most']:,} tokens" if budgets["most"] else "the length of the thoughts"
    rows = [
        ("long answers in the training split", found["long"]),
        ("thoughts cut", found["cut"]),
        ("- share of the long answers", found["cut"] / max(found["long"], 1)),
        ("stayed whole: thoughts within their budget", found["whole"]),
        *((f"tokens of thoughts left: {what}", n)
          for what, n in zip(("minimum", "median", "maximum"), found["tokens"], strict=False)),
    ]  # fmt: skip
    return Table(f"thinking budgets, from {budgets['least']:,} tokens to {most}", ("", "count"), rows)


def _unpaired(problems: dict[str, int]) -> str:
    """A warning if no problem has both modes; empty for a dataset without modes."""
    if problems.get("both", 1):
        return ""
    return (
        "! No problem is answered in both modes: the model may learn to take the mode from the topic, and its modes "
        "are never compared on the same problem. Give long and short answers to the same problems, or set cut_short."
    )


def counts_table(facts: dict[str, dict]) -> Table:
    """How many records of each split were written or dropped, from the manifests of `tokenize`."""
    names = list(dict.fromkeys(name for fact in facts.values() for name in fact["counts"]))
    rows = [(split, *(fact["counts"].get(name, 0) for name in names)) for split, fact in facts.items()]
    return Table("tokenized", ("split", *(name.replace("_", " ") for name in names)), rows)


def unused_table(facts: dict[str, dict]) -> Table:
    """Non-empty fields that are in no conversation, from the manifests of `build_hybrid` or `tokenize`."""
    rows = [(split, name, count) for split, fact in facts.items() for name, count in fact["unused_fields"].items()]
    rows.sort(key=lambda row: (row[0], -row[2]))
    return Table("unused fields" if rows else "no unused fields", ("", "field", "records"), rows)


def plot_balance(built: dict) -> Figure:
    """Shares of the modes in the training split, by samples and by length: balance in one does not imply the other."""
    modes, unit = built["balance"]["train"], built["unit"]
    names = {"samples": "samples", "prompt": f"{unit} of prompts", "answer": f"{unit} of answers"}
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    draw_bars(axes, {label: {mode: n[name] for mode, n in modes.items()} for name, label in names.items()})
    axes.set_title("modes in the training split", loc="left")
    return finished(figure)


def findings_table(folder: str | Path, count: int = 5) -> Table:
    """The first findings of `build_hybrid`: disagreeing answers, and short answers that are not shorter."""
    with (resolve(folder) / FINDINGS).open(encoding="utf-8") as file:
        findings = [json.loads(line) for line in islice(file, count)]
    rows = [
        (finding["finding"], begin(finding["problem"]), answer["place"], str(answer["says"]), answer["length"])
        for finding in findings for answer in finding["answers"]
    ]  # fmt: skip
    title = f"first {count} findings" if rows else "no findings"
    return Table(title, ("finding", "problem", "place", "final answer", "length"), rows)


def records_table(path: Path, count: int = 4) -> Table:
    """The first records of a split, with the beginning and end of each answer."""
    rows = [
        (record["mode"], begin(record["instruction"]), begin(record["output"]), end(record["output"]))
        for _, record in islice(read_records(path), count)
    ]
    return Table(f"first {count} records of {path.name}", ("mode", "problem", "answer begins", "answer ends"), rows)


def begin(text: str, count: int = CHARACTERS) -> str:
    """The first characters of a text, on one line."""
    return one_line(text[:count]) + " …" * (len(text) > count)


def end(text: str) -> str:
    """The last characters of a text, on one line."""
    return "… " * (len(text) > CHARACTERS) + one_line(text[-CHARACTERS:])
