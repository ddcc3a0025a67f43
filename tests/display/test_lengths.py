"""Statistics of a store and the cost of length settings, against loops over the samples."""

import io
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from rsft_lib.common.artifact import new_folder
from rsft_lib.data.packing import pack
from rsft_lib.data.store import StoreWriter, TokenStore
from rsft_lib.display.data import dataset, sample_stats
from rsft_lib.display.data.length_costs import BATCH, layout_costs, layouts, overlong_costs
from rsft_lib.display.data.lengths import half_of_tokens, plot_lengths
from rsft_lib.display.data.sample_stats import Samples
from rsft_lib.tokenizer.dialect import MODE_NAMES as MODES

THINK, END_THINK, SHORT, EOS = 3, 4, 5, 2
TOKENIZER = SimpleNamespace(
    get_added_vocab=lambda: {"<think>": THINK, "</think>": END_THINK, "<short>": SHORT, "<eos>": EOS}, eos_token_id=EOS
)


def random_sample(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A conversation of one to three turns, each of any mode, maybe truncated, with </think> in its question or as a
    forced close."""
    ids, mask = [1], [0]
    for _ in range(rng.integers(1, 4)):
        question = [9, *rng.choice([9, 10, END_THINK], size=rng.integers(1, 8)).tolist(), 9]
        body = rng.integers(20, 99, size=rng.integers(1, 12)).tolist()
        thoughts = [THINK, *body, END_THINK] if rng.random() < 0.9 else [THINK, *body]
        answer = [thoughts + [11], [SHORT, *body], body][rng.integers(3)] + [EOS]
        ids += question + answer
        forced = rng.random() < 0.2
        mask += [0] * len(question) + [int(not (forced and token == END_THINK)) for token in answer]
    cut = rng.integers(0, 3) if mask[-4:] == [1] * 4 else 0
    return ids[: len(ids) - cut], mask[: len(mask) - cut]


def closed_at(ids: list[int], mask: list[int]) -> list[int]:
    """The positions of </think> in answers, trained or forced."""
    closes = [at for at, token in enumerate(ids) if token == END_THINK and (mask[at] or mask[at - 1])]
    return [at for at in closes if mask[at] or at + 1 < len(ids) and mask[at + 1]]


def write_store(folder: Path, samples: list[tuple[list[int], list[int]]], lengths: list[int] = ()) -> TokenStore:
    with new_folder(folder, {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        for ids, mask in samples:
            writer.add(ids, mask)
        writer.close()
        if len(lengths):
            np.save(temporary / "lengths.npy", np.array(lengths, dtype=np.int32))
    return TokenStore(folder)


@pytest.mark.parametrize("chunk", [1, 17, 100, 1 << 24])
def test_columns_match_a_loop_over_the_samples(chunk, monkeypatch, tmp_path):
    monkeypatch.setattr(sample_stats, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    written = [random_sample(rng) for _ in range(300)]
    samples = sample_stats.measure(write_store(tmp_path / "store", written), TOKENIZER)
    for i, (ids, mask) in enumerate(written):
        first = mask.index(1)
        closings = closed_at(ids, mask)
        assert samples.lengths[i] == len(ids) and samples.trained[i] == sum(mask) and samples.first[i] == first
        assert samples.closed[i] == (closings[-1] + 1 if closings else 0)
        assert samples.cut[i] == any(not mask[at] for at in closings)
        assert samples.ended[i] == (ids[-1] == EOS)
        assert MODES[samples.modes[i]] == {THINK: "think", SHORT: "short"}.get(ids[first], "other")
    assert len(samples) == 300 and samples.present == ["think", "short", "other"] and not len(samples.dropped)
    assert {samples.closed.dtype, samples.first.dtype, samples.trained.dtype} == {np.dtype("int32")}


@pytest.mark.parametrize("mask", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 0, 0]])
def test_a_sample_with_all_or_no_targets_trained_is_rejected(mask, tmp_path):
    good = ([1, 9, SHORT, EOS], [0, 0, 1, 1])
    store = write_store(tmp_path / "store", [good, good, ([1, 9, 9, EOS], mask), good])
    with pytest.raises(ValueError, match="in 1 samples all or none of the targets are trained, first in sample 2"):
        sample_stats.measure(store, TOKENIZER)


def test_weights_decide_what_is_trained(tmp_path):
    store = write_store(tmp_path / "store", [([1, 9, SHORT, 20, EOS], [0, 1, 2, 2, 2])])
    store.weights = np.array([0, 0, 0.5], dtype=np.float32)
    samples = sample_stats.measure(store, TOKENIZER)
    assert samples.trained.tolist() == [3] and samples.first.tolist() == [2]


def stored(tmp_path: Path, name: str, lengths: list[int], count: int) -> Samples:
    samples = [([1, *[9] * 7, THINK, *[20] * i, END_THINK, EOS], [0] * 8 + [1] * (i + 3)) for i in range(count)]
    return sample_stats.measure(write_store(tmp_path / name, samples, lengths), TOKENIZER)


def test_dropped_and_truncated_records_count_with_their_original_lengths(tmp_path):
    kept = [11 + i for i in range(5)]
    dropped = stored(tmp_path, "dropped", [99, *kept[:2], 40, *kept[2:], 17], 5)
    assert sorted(dropped.dropped.tolist()) == [17, 40, 99] and dropped.lengths.tolist() == kept
    cut = stored(tmp_path, "cut", [*kept[:4], 80], 5)
    assert cut.lengths.tolist() == [*kept[:4], 80] and not len(cut.dropped)
    with pytest.raises(ValueError, match="do not match 5 samples: tokenize again"):
        stored(tmp_path, "wrong", [*kept, 3, 99], 5)

    table = overlong_costs(dropped, [16, 40])
    row, fitting = columns(table)
    assert row["over-long samples"] == 3 and row["not stored"] == 3 and row["think"] == 0
    assert fitting["over-long samples"] == 1 and "3 samples were too long to be stored" in table.note


def columns(table) -> list[dict]:
    """The columns of a table, except the first, which has the row labels."""
    names, *rest = zip(table.columns, *table.rows, strict=True)
    return [dict(zip(names, column, strict=True)) for column in rest]


def test_costs_match_truncating_and_dropping_every_sample(tmp_path):
    rng = np.random.default_rng(1)
    written = [random_sample(rng) for _ in range(200)]
    samples = sample_stats.measure(write_store(tmp_path / "store", written), TOKENIZER)
    every, trained = (sum(map(sum, column)) for column in ([[len(i)] for i, _ in written], [m for _, m in written]))
    for limit in (5, 10, 20, 40, 1000):
        (row,) = columns(overlong_costs(samples, [limit]))
        over = [(ids, mask) for ids, mask in written if len(ids) > limit]
        assert row["max_length"] == f"{limit:,}"
        assert row["over-long samples"] == len(over) == row["truncate: without EOS"]
        assert row["share of all"] == len(over) / 200
        assert sum(row[mode] for mode in MODES) == len(over)
        assert row["drop: tokens lost"] == pytest.approx(sum(len(ids) for ids, _ in over) / every)
        assert row["drop: trained tokens lost"] == pytest.approx(sum(sum(mask) for _, mask in over) / trained)
        assert row["truncate: tokens lost"] == pytest.approx(sum(len(ids) - limit for ids, _ in over) / every)
        assert row["truncate: nothing trained"] == sum(not any(mask[:limit]) for _, mask in over)
        ended = [closed_at(ids, mask) for ids, mask in over]
        assert row["truncate: without </think>"] == sum(bool(at) and at[-1] >= limit for at in ended)


def test_an_exact_fit_is_not_over_long_and_the_largest_limit_holds_all_samples(tmp_path):
    samples = stored(tmp_path, "store", (), 600)
    longest = int(samples.lengths.max())
    assert overlong_costs(samples, [longest, longest - 1]).rows[0][1:] == (0, 1)
    assert overlong_costs(samples).columns == ("max_length", "64", "128", "256", "512", "1,024")


def test_layouts_are_counted_row_by_row():
    lengths = np.random.default_rng(0).integers(5, 400, size=203).astype(np.int32)
    packed, batched, padded = layouts(lengths, 512, seed=3)
    packs = pack((lengths - 1).tolist(), 512)
    assert (packed.rows, packed.positions, packed.bytes) == (len(packs), len(packs) * 512, 5 * int(lengths.sum()))
    order = np.random.default_rng(3).permutation(lengths - 1).tolist()
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    assert batched.positions == sum(max(b) * len(b) for b in batches) and batched.rows == 203
    assert (padded.rows, padded.positions, padded.bytes) == (203, 203 * 512, 203 * 512 * 8)
    used = (lengths - 1).sum()
    table = layout_costs(lengths, 512)
    assert [row[3] for row in table.rows] == [used / x.positions for x in (packed, *layouts(lengths, 512)[1:])]
    with pytest.raises(ValueError, match="a pack has 100"):
        layouts(lengths, 100)


def test_the_token_weighted_median_is_dominated_by_long_samples():
    assert half_of_tokens(np.array([1, 1, 1, 1, 100])) == 100 and half_of_tokens(np.array([5, 5, 5, 5])) == 5


def test_the_figure_has_all_panels_with_legends_and_is_closed(tmp_path):
    rng = np.random.default_rng(0)
    samples = sample_stats.measure(write_store(tmp_path / "store", [random_sample(rng) for _ in range(80)]), TOKENIZER)
    before = plt.get_fignums()
    figure = plot_lengths(samples, 128)
    assert plt.get_fignums() == before and len(figure.axes) == 5
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG") and len(file.getvalue()) > 20_000
    for axes in figure.axes:
        assert axes.get_title(loc="left") and axes.get_legend()
        hatches = {handle.get_hatch() for handle in axes.get_legend().legend_handles}
        assert len(hatches) == len(axes.get_legend().legend_handles)  # distinguishable without colour
    shares = sum(bar.get_height() for bar in figure.axes[0].patches)
    assert shares == pytest.approx(1)


def test_a_single_sample_can_be_plotted(tmp_path):
    samples = sample_stats.measure(write_store(tmp_path / "store", [([1, 9, SHORT, EOS], [0, 0, 1, 1])]), TOKENIZER)
    plot_lengths(samples, 16).savefig(io.BytesIO())


COUNTED = ("samples", "choices", "prompt", "answer")
BUILT = {
    "unit": "tokens",
    "records": {"read": 12, "rejected": 1, "disagreeing": 2, "cut": 3},
    "problems": {"both": 4, "think_only": 2, "short_only": 1},
    "findings": {"final answers differ": 1},
    "balance": {
        split: {mode: dict(zip(COUNTED, numbers, strict=True)) for mode, numbers in modes.items()}
        for split, modes in {
            "train": {"think": (5, 5, 50, 900), "short": (5, 3, 50, 100)},
            "heldout": {"think": (2, 2, 20, 30), "short": (0, 0, 0, 0)},
        }.items()
    },
}  # fmt: skip


def test_dataset_tables_and_plot_have_the_counts():
    text = repr(dataset.balance_table(BUILT))
    assert "90.0%" in text and "10.0%" in text and " 180 " in text and "answer tokens" in text
    origin = dict(dataset.origin_table(BUILT).rows)
    assert origin["records read"] == 12 and origin["= samples"] == 12 == 12 - 1 - 2 + 3
    assert origin["finding: final answers differ"] == 1
    before = plt.get_fignums()
    figure = dataset.plot_balance(BUILT)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert "think 90.0%" in texts and "think 50.0%" in texts and plt.get_fignums() == before
