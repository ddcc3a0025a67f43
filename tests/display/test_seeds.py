"""Runs grouped by setting, and the intervals of their means."""

import math
from statistics import stdev

import pytest

from rsft_lib.display.runs.seeds import Outcome, margin, means_table, plot_settings, settings_of

T = {
    2: 12.7062,
    3: 4.3027,
    11: 2.2281,
    12: 2.2010,
    20: 2.0930,
    101: 1.9840,
}  # runs -> Student's t, from a table


def outcomes(**metrics: list[float]) -> list[Outcome]:
    """One setting for each name, with a run for each value."""
    return [
        Outcome({"lr_schedule": name, "seed": seed, "train_iters": 5}, value, None)
        for name, values in metrics.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize("count", T)
def test_the_interval_is_students(count):
    values = [float((7 * number) % 10) for number in range(count)]
    assert margin(values) == pytest.approx(T[count] * stdev(values) / math.sqrt(count), rel=1e-3)


def test_runs_that_differ_in_their_seed_only_are_one_setting():
    settings = settings_of(outcomes(cosine=[1.0, 2.0, 3.0], wsd=[5.0, 5.0]))
    assert [one.label for one in settings] == ["lr_schedule cosine", "lr_schedule wsd"]
    assert [(one.mean, len(one.runs)) for one in settings] == [(2.0, 3), (5.0, 2)]
    assert [one.label for one in settings_of(outcomes(cosine=[1.0, 2.0]))] == ["all"]


def test_the_figure_has_the_interval_and_a_dot_for_each_run():
    axes = plot_settings(outcomes(cosine=[1.0, 2.0, 3.0], wsd=[5.0]), "loss").axes
    assert len(axes) == 1, "nothing was trained, so there are no curves"
    (bar,) = axes[0].collections[0].get_segments()
    assert bar[:, 1] == pytest.approx([2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)])
    dots = [line.get_ydata().tolist() for line in axes[0].lines if line.get_marker() == "o"]
    assert dots == [[1.0, 2.0, 3.0], [5.0]]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["lr_schedule cosine", "lr_schedule wsd"]


def test_a_single_run_has_no_interval_and_no_run_has_a_table():
    assert "a single run has no interval" in repr(means_table(outcomes(cosine=[1.0], wsd=[2.0]), "loss"))
    assert means_table([], "loss").rows == []
    assert plot_settings([], "loss").axes
