"""Answers of a model by mode: side by side, accuracy, length, and the mode that the model chooses itself."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from rsft_lib.common.visible import visible
from rsft_lib.display.html import BLOCK, FAINT, PANEL, Table, caption, escaped, inert, tint
from rsft_lib.display.mask.sample import COLOR, chip
from rsft_lib.display.plot_style import NEUTRAL, finished
from rsft_lib.display.stacked_bars import LOOK
from rsft_lib.evaluation.verification_card import budgets_of
from rsft_lib.generation.answer import Answer, chosen_mode, count_correct, is_correct, loops, obeyed, well_formed
from rsft_lib.generation.intervals import wilson
from rsft_lib.tokenizer.dialect import END_THINK, MODES, THINK

SHOWN = 3000  # most characters shown of a text, half of them from its end
Answers = dict[str | None, list[Answer]]  # by requested mode; None if the model chose
Within = Mapping[int | None, list[Answer]]  # by thinking budget in tokens; None for none


@dataclass(frozen=True)
class SideBySide:
    """One question and its answer in each mode; `writing`: the answers are not finished."""

    question: str
    answers: dict[str | None, Answer]
    expected: str | None = None
    writing: bool = False

    def __repr__(self) -> str:
        expected = f"expected: {visible(self.expected)}" if self.expected else ""
        parts = [f"{_name(mode)}  {self._remark(mode)}\n{visible(_cut(a.text))}" for mode, a in self.answers.items()]
        return "\n\n".join(filter(None, [f"question: {visible(self.question)}", expected, *parts]))

    def _repr_html_(self) -> str:
        reference = self.expected or ""
        expected = f" &nbsp; <span style='{FAINT}'>expected</span> <b>{inert(reference)}</b>" if reference else ""
        return (
            f"<div style='{PANEL}'><b>{inert(self.question)}</b>{expected}"
            f"<div style='display:flex;flex-wrap:wrap;margin-top:6px'>{''.join(map(self._column, self.answers))}</div>"
            "</div>"
        )

    def _column(self, mode: str | None) -> str:
        answer = self.answers[mode]
        edge = COLOR.get(chosen_mode(answer), COLOR["answer"])
        title = "<b>answer</b>" if mode == "other" else chip(mode or chosen_mode(answer))
        if mode is None:
            title = f"<b>free choice</b>: {title}"
        style = f"flex:1 1 20em;min-width:0;margin:2px 10px 2px 0;border-left:4px solid {edge};padding-left:8px"
        return f"<div style='{style}'>{title} &nbsp; {inert(self._remark(mode))}{_text_html(answer.text)}</div>"

    def _remark(self, mode: str | None) -> str:
        answer = self.answers[mode]
        notes = [f"{answer.tokens:,} tokens"]
        if self.expected is not None:
            notes.append("✓ correct" if is_correct(answer, self.expected) else "✗ wrong")
        if not answer.ended:
            notes.append("…" if self.writing else "cut off")
        elif not well_formed(answer, mode):
            notes.append("not well-formed")
        if loops(answer):
            notes.append("loops")
        return " · ".join(notes)


def side_by_side(questions: Sequence[str], answers: Answers, number: int, expected: Sequence[str | None]) -> SideBySide:
    """Question `number` and its answers.

    Raises:
        ValueError: there is no such question.
    """
    if not 0 <= number < len(questions):
        raise ValueError(f"no question {number}: there are questions 0 to {len(questions) - 1}")
    return SideBySide(questions[number], {mode: given[number] for mode, given in answers.items()}, expected[number])


def scores_table(answers: Answers, expected: Sequence[str | None]) -> Table:
    """Accuracy with its 95 % Wilson interval, share of well-formed answers, how many were cut off and how many loop,
    lengths; by mode."""
    rows = []
    for mode, given in answers.items():
        right, known = count_correct(given, expected)
        low, high = wilson(right, known)
        lengths = np.array([answer.tokens for answer in given])
        rows.append((
            _name(mode), f"{right / known:.1%}" if known else "–", f"{low:.0%} to {high:.0%}" if known else "–",
            np.mean([well_formed(a, mode) for a in given]).item(),
            sum(not a.ended for a in given), sum(map(loops, given)), f"{lengths.mean():,.1f}",
            int(np.median(lengths)), int(lengths.max()),
        ))  # fmt: skip
    columns = ("mode", "accuracy", "95 % interval", "well-formed", "cut off", "loops", "tokens, mean", "median", "max")
    return Table(f"answers to {len(given):,} questions", columns, rows)


def obedience_table(answers: Answers) -> Table:
    """The modes of the answers by the mode that was asked for; empty for a model without modes."""
    rows = []
    for mode in (mode for mode in answers if mode in MODES):
        counts = Counter(map(chosen_mode, answers[mode]))
        rows.append((mode, *(counts[chosen] for chosen in (*MODES, "neither")), f"{obeyed(answers[mode], mode):.1%}"))
    columns = ("asked for", *(f"answers in {mode}" for mode in MODES), "in neither", "as asked")
    return Table("modes asked for and answered in" if rows else "the model has no modes to ask for", columns, rows)


def choices_table(answers: Answers, expected: Sequence[str | None]) -> Table:
    """The modes that the model chose, with accuracy and length; empty for a model without modes."""
    free, rows = answers.get(None, []), []
    if not free:
        return Table("the model has no modes to choose from", (), [])
    for mode in (*MODES, "neither"):
        picked = [i for i, answer in enumerate(free) if chosen_mode(answer) == mode]
        right, known = count_correct([free[i] for i in picked], [expected[i] for i in picked])
        tokens = np.mean([free[i].tokens for i in picked]) if picked else 0
        share = f"{right / known:.1%}" if known else "–"
        rows.append((mode, len(picked), len(picked) / len(free), share, f"{tokens:,.1f}"))
    return Table("modes chosen by the model", ("mode", "answers", "share", "accuracy", "tokens, mean"), rows)


def plot_answers(
    answers: Answers, expected: Sequence[str | None], others: Mapping[str, dict[str, dict]] = MappingProxyType({})
) -> Figure:
    """Accuracy against the tokens it takes, and answer lengths, by mode.

    Where no answer is known, the share of well-formed answers takes the place of accuracy.

    Args:
        others: scores of other checkpoints, from `verification_card.scores_of`; a line leads through them to this one.

    Raises:
        ValueError: another checkpoint was not scored in the same way.
    """
    figure, (costs, lengths) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    known = any(e is not None for e in expected)
    for marker, (mode, given) in zip("osDv", answers.items(), strict=False):
        point = _draw_cost(costs, mode, given, expected, marker)
        _draw_others(costs, mode, others, point, "accuracy" if known else "well_formed")
    what = "correct" if known else "well-formed (no answers are known)"
    costs.set(ylim=(-0.05, 1.05), xscale="log", xlabel="tokens per answer, mean")
    costs.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    costs.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    costs.xaxis.set_minor_formatter(NullFormatter())
    costs.yaxis.set_major_formatter(PercentFormatter(1))
    costs.set_title(f"{what}, against tokens; lines: 95 % intervals", loc="left", fontsize="medium")
    costs.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    costs.grid(alpha=0.3)
    names = [_name(mode) for mode in answers]
    for y, (mode, given) in enumerate(answers.items()):
        _draw_lengths(lengths, y, np.array([answer.tokens for answer in given]), LOOK[mode or "other"]["facecolor"])
    lengths.set_yticks(range(len(names)), names)
    lengths.set_ylim(len(names) - 0.5, -0.5)
    lengths.set_xlim(left=0)
    lengths.set_title("tokens per answer; bar: median", loc="left", fontsize="medium")
    for axes in (costs, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def plot_choices(answers: Answers, expected: Sequence[str | None], difficulty: Sequence[float]) -> Figure:
    """By difficulty: how often the model chooses to think, and the accuracy in each mode; lines: 95 % intervals."""
    figure, (shares, accuracies) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharex=True, sharey=True)
    levels = sorted(set(difficulty))
    alike = [[i for i, level in enumerate(difficulty) if level == one] for one in levels]
    thought = [chosen_mode(answer) == "think" for answer in answers[None]]
    places = np.arange(len(levels))
    _draw_shares(shares, None, [(sum(thought[i] for i in some), len(some)) for some in alike], places)
    for number, (mode, given) in enumerate(answers.items()):
        counts = [count_correct([given[i] for i in some], [expected[i] for i in some]) for some in alike]
        _draw_shares(accuracies, mode, counts, places + 0.08 * (number - 1))
    shares.set_title("chooses to think, by difficulty", loc="left", fontsize="medium")
    accuracies.set_title("correct, by difficulty", loc="left", fontsize="medium")
    accuracies.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    for axes in (shares, accuracies):
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set(ylim=(-0.05, 1.05), xlabel="difficulty")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def budgets_table(within: Within, expected: Sequence[str | None]) -> Table:
    """Accuracy and length of answers with thoughts by thinking budget; empty for a model without modes."""
    rows = []
    for budget, given in within.items():
        right, known = count_correct(given, expected)
        low, high = wilson(right, known)
        interval = (f"{right / known:.1%}", f"{low:.0%} to {high:.0%}") if known else ("–", "–")
        formed = np.mean([well_formed(answer, "think") for answer in given]).item()
        tokens = np.mean([answer.tokens for answer in given])
        rows.append(("none" if budget is None else f"{budget:,}", *interval, formed, f"{tokens:,.1f}"))
    columns = ("thinking budget, tokens", "accuracy", "95 % interval", "well-formed", "tokens, mean")
    return Table("answers within a thinking budget" if rows else "the model has no thoughts to limit", columns, rows)


def plot_budgets(
    within: Within, answers: Answers, expected: Sequence[str | None],
    others: Mapping[str, dict[str, dict]] = MappingProxyType({}),
) -> Figure:  # fmt: skip
    """Accuracy against the thinking budget, with that of short answers and that without a budget.

    Args:
        others: scores of other checkpoints, from `verification_card.scores_of`, at their own budgets.
    """
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    limited = {budget: given for budget, given in within.items() if budget is not None}
    _draw_shares(axes, "think", [count_correct(given, expected) for given in limited.values()], [*limited])
    for name, style, given in (("no budget", "--", within.get(None)), ("short", ":", answers.get("short"))):
        if given and (known := count_correct(given, expected))[1]:
            share, mode = known[0] / known[1], "short" if name == "short" else "think"
            label = f"{name}: {share:.0%}, {np.mean([a.tokens for a in given]):,.0f} tokens"
            axes.axhline(share, linestyle=style, color=LOOK[mode]["facecolor"], label=label)
    for marker, (name, scores) in zip("sDv^", others.items(), strict=False):
        theirs = {budget: score.get("accuracy", np.nan) for budget, score in budgets_of(scores).items()}
        axes.plot([*theirs], [*theirs.values()], marker=marker, color=NEUTRAL, linestyle=":", label=caption(name))
    axes.set(ylim=(-0.05, 1.05), xlabel="thinking budget: maximum tokens of thoughts")
    axes.set_xscale("log" if limited else "linear")
    axes.set_xticks([*limited], [f"{budget:,}" for budget in limited], minor=False)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("correct within a budget; lines: 95 % intervals", loc="left", fontsize="medium")
    axes.legend(fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return finished(figure)


def _draw_cost(
    axes: Axes, mode: str | None, given: list[Answer], expected: Sequence[str | None], marker: str
) -> Line2D:
    """A point with 95 % intervals of both coordinates."""
    good, count = count_correct(given, expected)
    if not count:
        good, count = sum(well_formed(answer, mode) for answer in given), len(given)
    tokens = np.array([answer.tokens for answer in given])
    share, (low, high), x = good / count, wilson(good, count), max(tokens.mean(), 1)
    spread = min(1.96 * tokens.std() / np.sqrt(len(tokens)), x * 0.9)
    point, *_ = axes.errorbar(
        x, share, xerr=spread, yerr=[[max(share - low, 0)], [max(high - share, 0)]], fmt=marker, markersize=9,
        color=LOOK[mode or "other"]["facecolor"], markerfacecolor=None if mode else "none",
        label=f"{_name(mode)}: {share:.0%}, {x:,.0f} tokens",
    )  # fmt: skip
    return point


def _draw_others(axes: Axes, mode: str | None, others: Mapping[str, dict[str, dict]], point: Line2D, good: str) -> None:
    """Small points of other checkpoints in the mode of `point`, joined to it in the order given."""
    places = []
    for name, scores in others.items():
        score = scores.get(mode or "free choice", {})
        if good not in score:
            raise ValueError(f"{name}: no {good} in mode {_name(mode)}; run notebook 07 on it with these questions")
        places.append((max(score["tokens"], 1), score[good]))
        axes.annotate(caption(name), places[-1], xytext=(5, 3), textcoords="offset points", fontsize="x-small")
    if places:
        style = {"marker": point.get_marker(), "markersize": 4, "linestyle": ":", "color": point.get_color()}
        axes.plot(*zip(*places, (point.get_xdata()[0], point.get_ydata()[0]), strict=True), **style)


def _draw_shares(axes: Axes, mode: str | None, counts: list[tuple[int, int]], places: Sequence[float]) -> None:
    """A line of shares with their intervals at `places` [counts]."""
    share = np.array([good / count if count else np.nan for good, count in counts])
    low, high = np.array([wilson(*pair) for pair in counts]).reshape(-1, 2).T
    axes.errorbar(
        places, share, yerr=np.clip([share - low, high - share], 0, None), marker="o",
        color=LOOK[mode or "other"]["facecolor"], markerfacecolor=None if mode else "none", label=_name(mode),
    )  # fmt: skip


def _draw_lengths(axes: Axes, y: int, tokens: np.ndarray, color: str) -> None:
    spread = np.random.default_rng(0).uniform(-0.22, 0.22, len(tokens))  # jitter, so that equal lengths do not overlap
    axes.scatter(tokens, y + spread, s=12, color=color, alpha=0.4, linewidths=0)
    median = np.median(tokens)
    axes.plot([median, median], [y - 0.32, y + 0.32], color=NEUTRAL, linewidth=2)
    axes.text(median, y - 0.36, f"{median:,.0f}", ha="center", va="bottom", fontsize="small")


def _name(mode: str | None) -> str:
    if mode is None:
        return "free choice"
    return "answers" if mode == "other" else mode


def _text_html(text: str) -> str:
    """An answer, with its chain of thought in a block of its own."""
    thoughts, closed, rest = text.rpartition(END_THINK)
    blocks = [("think", thoughts + closed), ("answer", rest)] if closed else [("answer", rest)]
    if not closed and text.startswith(THINK):
        blocks = [("think", text)]
    return "".join(
        f"<pre style='{BLOCK};{tint(COLOR[kind])}'>{escaped(_cut(part))}</pre>"
        for kind, part in blocks if part
    )  # fmt: skip


def _cut(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    return f"{text[: SHOWN // 2]}\n… {len(text) - SHOWN:,} more characters …\n{text[-SHOWN // 2 :]}"
