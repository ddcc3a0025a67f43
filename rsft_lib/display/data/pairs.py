"""Notebook 10: what became of the questions, how models are asked, and how often they are right."""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rsft_lib.common.paths import resolve
from rsft_lib.data.clean_questions import DUPLICATES
from rsft_lib.display.data.dataset import begin, end
from rsft_lib.display.html import Table
from rsft_lib.display.plot_style import NEUTRAL, finished
from rsft_lib.display.stacked_bars import EDGE, LOOK
from rsft_lib.generation.generate import dialect_of_any
from rsft_lib.generation.make_pairs import LEFT_OUT, PAIRS, SHARE
from rsft_lib.generation.sampled_answers import Asked, read_questions
from rsft_lib.tokenizer.chat import prompt_text
from rsft_lib.tokenizer.dialect import MODES, SHORT
from rsft_lib.tokenizer.patch import load_tokenizer

SHARED = 400  # characters shown of a shared text
FATES = {  # of a question: name in the manifests -> label and look
    "duplicates": ("repeated", "context"), "leaked": ("in an evaluation set", "padding"),
    "neither": ("no right answer", "context"), "short_only": ("only short right", "short"),
    "think_only": ("only long right", "think"), "both": ("both right", "trained"),
}  # fmt: skip


def questions_table(cleaned: dict) -> Table:
    """What became of the records, from the manifest of `clean_questions`."""
    counts, known = cleaned["counts"], cleaned["counts"]["evaluation"]
    rows = [
        ("records read", counts["read"]),
        ("- rejected", counts["rejected"]),
        ("- repeated questions", counts["duplicates"]),
        (f"- found in the {known:,} questions of the evaluation sets", counts["leaked"]),
        ("- beyond `count`", counts["beyond"]),
        ("= questions to ask", counts["kept"]),
        ("questions that share only forms with the evaluation sets", counts["with_forms"]),
    ]
    note = "" if known else "! No evaluation set is given: nothing shows whether you train on its questions."
    if counts["evaluation_rejected"]:
        note = (
            f"! {counts['evaluation_rejected']:,} records of the evaluation sets are rejected: those are not compared."
        )
    return Table("questions", ("", "count"), rows, note)


def shared_table(folder: str | Path, name: str, count: int = 5) -> Table:
    """The texts that most questions share with an evaluation set, each with one of the questions.

    Args:
        name: LEAKS or FORMS.
    """
    found: dict[str, list[dict]] = {}
    for leak in _lines(folder, name):
        found.setdefault(leak["text"], []).append(leak)
    most = sorted(found.values(), key=len, reverse=True)[:count]
    rows = [
        (len(own), own[0]["words"], begin(own[0]["text"], SHARED), own[0]["place"], own[0]["evaluation"])
        for own in most
    ]
    what = name.partition(".")[0]
    title = (
        f"{what}: {len(found):,} shared texts" + f", the first {count}" * (len(found) > count) if rows else f"no {what}"
    )
    return Table(title, ("questions", "words", "shared text", "first question", "evaluation set"), rows)


def duplicates_table(folder: str | Path, count: int = 3) -> Table:
    """The first repeated questions."""
    rows = [(one["place"], one["same_as"], begin(one["question"])) for one in islice(_lines(folder, DUPLICATES), count)]
    return Table("first repeated questions" if rows else "no repeated questions", ("", "same as", "question"), rows)


def prompts_table(asked: Sequence[Asked], questions: Path) -> Table:
    """How each model is asked: the first question, as the prompt of each mode."""
    question, rows = read_questions(questions)[0], []
    for one in asked:
        dialect = dialect_of_any(one.model)
        mode = one.mode if one.mode in dialect.forms else None
        text = prompt_text(load_tokenizer(one.model), question.messages, mode, question.tools, dialect)
        rows.append((one.mode, Path(one.model).name, dialect.name, end(text)))
    return Table("prompts", ("mode", "model", "asked as", "the prompt ends"), rows)


def answers_table(built: dict) -> Table:
    """How many answers are usable and right, from the manifest of `make_pairs`."""
    rows = [
        (mode, n["answers"], n["well_formed"], n["cut_off"], n["right"], n["right"] / max(1, n["answers"]),
         f"{n['tokens'] / max(1, n['answers']):,.1f}")
        for mode, n in built["modes"].items()
    ]  # fmt: skip
    note = f"compared by {' and '.join(built['judges'])}"
    note += f"; {built['by_math_verify']:,} are right by math-verify alone" if len(built["judges"]) > 1 else ""
    if not any(n["right"] for n in built["modes"].values()):
        note = "! No answer is right, so there are no pairs: check the known answers, the prompts and `max_new_tokens`."
    columns = ("mode", "answers", "well-formed", "cut off", "right", "share right", "tokens, mean")
    return Table("answers", columns, rows, note)


def pairs_table(folder: str | Path, count: int = 4) -> Table:
    """The first chosen answers, with the shares of right ones."""
    rows = []
    for one in islice(_lines(folder, PAIRS), count):
        *_, question, answer = one["messages"]
        mode = "short" if answer["content"].startswith(SHORT) else "think"
        shares = [one[SHARE[name]] for name in ("short", "think")]
        rows.append((mode, begin(question["content"]), begin(answer["content"]), end(answer["content"]), *shares))
    columns = ("mode", "question", "answer begins", "answer ends", "short right", "long right")
    return Table(f"first {len(rows)} answers" if rows else "no right answers", columns, rows)


def left_out_table(folder: str | Path, count: int = 4) -> Table:
    """The first questions without a right answer: the known answer, and those given."""
    rows = [
        (begin(one["question"]), one["answer"], *(", ".join(map(str, one["said"][mode])) for mode in MODES))
        for one in islice(_lines(folder, LEFT_OUT), count)
    ]
    columns = ("question", "known answer", *(f"{mode} answered" for mode in MODES))
    return Table("first questions without a right answer" if rows else "all have a right answer", columns, rows)


def plot_pairs(cleaned: dict, built: dict) -> Figure:
    """What became of the questions, without those beyond `count`; and how often each is answered right, by mode."""
    figure, (fates, shares) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", width_ratios=(3, 2))
    counts = cleaned["counts"] | built["problems"]
    for y, name in enumerate(FATES):
        fates.barh(y, counts[name], height=0.6, **LOOK[FATES[name][1]], **EDGE)
        fates.text(counts[name], y, f" {counts[name]:,}", va="center", fontsize=9)
    fates.set_yticks(range(len(FATES)), [label for label, _ in FATES.values()])
    fates.invert_yaxis()
    fates.margins(x=0.12)
    fates.set_title("questions left out, and asked", loc="left", fontsize="medium")
    _draw_shares(shares, built)
    for axes in (fates, shares):
        axes.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def _draw_shares(axes: Axes, built: dict) -> None:
    """A disc for each combination of right short and right long answers; its area is the number of questions."""
    samples = max(one["samples"] for one in built["asked"])
    most = max(count for *_, count in built["shares"])
    for short, long, count in built["shares"]:
        look = LOOK["padding" if not short + long else "short" if short >= long else "think"]
        size = 30 + 1000 * count / most  # in square points
        axes.scatter(short, long, s=size, **look, **EDGE, zorder=2)
        beside = (0.56 * size**0.5 + 3, 0)
        axes.annotate(f"{count:,}", (short, long), beside, textcoords="offset points", va="center", fontsize=9)
    axes.plot([-0.6, samples + 0.6], [-0.6, samples + 0.6], linestyle=":", color=NEUTRAL, linewidth=1)
    axes.set(xlim=(-0.6, samples + 0.9), ylim=(-0.6, samples + 0.6), xlabel="right short answers",
             ylabel="right long answers")  # fmt: skip
    axes.set_xticks(range(samples + 1))
    axes.set_yticks(range(samples + 1))
    axes.set_title(f"questions, by right answers of {samples}", loc="left", fontsize="medium")


def _lines(folder: str | Path, name: str) -> Iterator[dict]:
    with (resolve(folder) / name).open(encoding="utf-8") as file:
        yield from map(json.loads, file)
