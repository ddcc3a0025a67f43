"""A hybrid dataset: where its samples come from, what its modes cost, and what was found odd."""

import json
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rsft_lib.common.paths import resolve
from rsft_lib.data.hybrid import FINDINGS
from rsft_lib.data.records import read_records
from rsft_lib.display.html import Table, one_line
from rsft_lib.display.stacked_bars import draw_bars

CHARACTERS = 60  # of a text that are shown


def balance_table(built: dict) -> Table:
    """Samples and lengths by split and mode, from the facts of `build_hybrid`."""
    unit, rows = built["unit"], []
    for split, modes in built["balance"].items():
        total = sum(mode["answer"] for mode in modes.values())
        for mode, n in modes.items():
            mean = round(n["answer"] / n["samples"]) if n["samples"] else 0
            rows.append((split, mode, n["samples"], n["prompt"], n["answer"], mean, n["answer"] / total))
    columns = ("split", "mode", "samples", f"prompt {unit}", f"answer {unit}", "of one answer", "share of answers")
    return Table("balance", columns, rows)


def origin_table(built: dict) -> Table:
    """What became of the records, and which problems are answered how."""
    records = built["records"]
    names = {
        "both": "problems answered in both modes", "think_only": "problems with <think> alone",
        "short_only": "problems with <short> alone", "other": "problems, all answered without a control token",
    }  # fmt: skip
    rows = [
        ("records read", records["read"]),
        ("- rejected", records["rejected"]),
        ("- dropped, since final answers disagree", records["disagreeing"]),
        ("+ short answers cut from long ones", records["cut"]),
        ("= samples", sum(mode["samples"] for modes in built["balance"].values() for mode in modes.values())),
        *((names[modes], count) for modes, count in built["problems"].items()),
        *((f"found: {what}", count) for what, count in built["findings"].items()),
    ]
    return Table("where the samples come from", ("", "count"), rows)


def counts_table(facts: dict[str, dict]) -> Table:
    """What became of the records of each split, from the facts of `tokenize`."""
    names = list(dict.fromkeys(name for fact in facts.values() for name in fact["counts"]))
    rows = [(split, *(fact["counts"].get(name, 0) for name in names)) for split, fact in facts.items()]
    return Table("tokenized", ("split", *(name.replace("_", " ") for name in names)), rows)


def unused_table(facts: dict[str, dict]) -> Table:
    """The fields that hold something and are part of no conversation, from facts of `build_hybrid` or `tokenize`."""
    rows = [(split, name, count) for split, fact in facts.items() for name, count in fact["unused_fields"].items()]
    rows.sort(key=lambda row: (row[0], -row[2]))
    return Table("fields that are not used" if rows else "every field is used", ("", "field", "records"), rows)


def plot_balance(built: dict) -> Figure:
    """The modes of the training split by samples and by what they are long: even in one is not even in the other."""
    modes, unit = built["balance"]["train"], built["unit"]
    names = {"samples": "samples", "prompt": f"{unit} of prompts", "answer": f"{unit} of answers"}
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    draw_bars(axes, {said: {mode: n[name] for mode, n in modes.items()} for name, said in names.items()})
    axes.set_title("modes of the training split", loc="left")
    plt.close(figure)  # the notebook shows what a cell returns; once is enough
    return figure


def findings_table(folder: str | Path, count: int = 5) -> Table:
    """The first findings of `build_hybrid`: answers that disagree, and short ones that are no shorter."""
    with (resolve(folder) / FINDINGS).open(encoding="utf-8") as file:
        findings = [json.loads(line) for line in islice(file, count)]
    rows = [
        (found["finding"], _begin(found["problem"]), answer["place"], str(answer["says"]), answer["length"])
        for found in findings for answer in found["answers"]
    ]  # fmt: skip
    title = f"findings, the first {count}" if rows else "findings: none"
    return Table(title, ("finding", "problem", "place", "final answer", "length"), rows)


def records_table(path: Path, count: int = 4) -> Table:
    """The first records of a split, by their beginnings and ends."""
    rows = [
        (record["mode"], _begin(record["instruction"]), _begin(record["output"]), _end(record["output"]))
        for _, record in islice(read_records(path), count)
    ]
    return Table(f"{path.name}, the first {count}", ("mode", "problem", "answer begins", "and ends"), rows)


def _begin(text: str) -> str:
    return one_line(text[:CHARACTERS]) + " …" * (len(text) > CHARACTERS)


def _end(text: str) -> str:
    return "… " * (len(text) > CHARACTERS) + one_line(text[-CHARACTERS:])
