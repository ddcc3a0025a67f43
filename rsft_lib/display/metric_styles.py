"""How the metrics of `metrics.jsonl` are named and drawn, and which panel has which."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from rsft_lib.display.plot_style import BLUE, GREEN, NEUTRAL, ORANGE, PINK, SKY


class Metric(NamedTuple):
    """The title of a panel of its own, the name in a legend, colour and line style."""

    title: str
    name: str
    color: str = BLUE
    style: str = "-"


METRICS = {
    "loss": Metric("loss per trained token", "all", NEUTRAL, ":"),
    "loss_mode_think": Metric("loss of <think> answers", "<think>", BLUE, "-"),
    "loss_mode_short": Metric("loss of <short> answers", "<short>", ORANGE, "--"),
    "loss_mode_other": Metric("loss of answers without a mode", "other", NEUTRAL, "-"),
    "loss_span_control": Metric("loss of the control token", "control token", PINK, ":"),
    "loss_span_think": Metric("loss of the chain of thought", "chain of thought", SKY, ":"),
    "loss_span_answer": Metric("loss of answer tokens", "answer", GREEN, ":"),
    "loss_span_eos": Metric("loss of EOS", "EOS", NEUTRAL, ":"),
    "p_think_when_think": Metric("P(<think>) for <think> samples", "for <think> samples", BLUE, "-"),
    "p_think_when_short": Metric("P(<think>) for <short> samples", "for <short> samples", ORANGE, "--"),
    "think_share": Metric("share of <think> samples", "share of <think> samples", NEUTRAL, ":"),
    "expert_load_max": Metric("load of the busiest expert (mean: 1)", "busiest expert"),
    "dead_experts": Metric("experts without a token in a step", "experts without a token"),
    "think_accuracy": Metric("correct <think> answers", "<think>", BLUE, "-"),
    "short_accuracy": Metric("correct <short> answers", "<short>", ORANGE, "--"),
    "choice_accuracy": Metric("correct answers by own choice", "own choice", NEUTRAL, "-."),
    "answer_accuracy": Metric("correct answers", "answers", NEUTRAL, "-"),
    "choice_thinks": Metric("share of <think> by own choice", "thinks by own choice", PINK, ":"),
    "think_tokens": Metric("tokens per <think> answer", "<think>", BLUE, "-"),
    "short_tokens": Metric("tokens per <short> answer", "<short>", ORANGE, "--"),
    "choice_tokens": Metric("tokens per answer by own choice", "own choice", NEUTRAL, "-."),
    "answer_tokens": Metric("tokens per answer", "answers", NEUTRAL, "-"),
    "grad_norm": Metric("gradient norm, before clipping", "gradient norm"),
    "lr": Metric("learning rate", "learning rate"),
    "tokens_per_second": Metric("tokens per second", "tokens per second"),
    "memory_gib": Metric("peak memory, GiB", "memory"),
}
SET = re.compile(r"eval_(?:(.+)_)?loss")
MARKERS, SIGNS = "osD^P*X", "●■◆▲✚★✖"  # of held-out sets, in plots and in text


def held_out_sets(metrics: Iterable[str]) -> dict[str, str]:
    """Label of each held-out set -> the metric of its loss: "held-out" (`eval_data`), then "held-out NAME"."""
    found = {f"held-out {match[1] or ''}".rstrip(): name for name in metrics if (match := SET.fullmatch(name))}
    return dict(sorted(found.items(), key=lambda item: (item[1] != "eval_loss", item[0])))


BY_MODE = [name for name in METRICS if name.startswith("loss_mode_")]
BY_SPAN = [name for name in METRICS if name.startswith("loss_span_")]
ONE_MODE = ["loss_span_answer", "loss_span_eos"]  # of data without modes
LOSSES = ["loss_mode_think", "loss_mode_short", "loss"]  # of the dashboard
CHOICES = ["p_think_when_think", "p_think_when_short", "think_share"]
ANSWERS = ["think_accuracy", "short_accuracy", "choice_accuracy", "answer_accuracy", "choice_thinks"]
TOKENS = ["think_tokens", "short_tokens", "choice_tokens", "answer_tokens"]  # of these answers
EXPERTS = ["expert_load_max", "dead_experts"]  # of models with experts
HEALTH = ["grad_norm", "lr", "tokens_per_second", "memory_gib"]
