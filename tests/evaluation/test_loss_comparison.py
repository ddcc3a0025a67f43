"""Comparison of token losses, against loops over all tokens."""

import html
import json
import re
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
from contrast import THEMES, contrast, over

from rsft_lib import demo
from rsft_lib.common.artifact import MANIFEST, file_hash, new_folder
from rsft_lib.data.exclude import exclude, source_lines
from rsft_lib.data.records import read_records
from rsft_lib.data.span_kinds import KINDS, MODE_NAMES, control_tokens, kinds
from rsft_lib.data.splits import splits_of
from rsft_lib.data.store import ROWS, TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.display.losses import browse, token_loss_map
from rsft_lib.display.losses.browse import clickable_plot
from rsft_lib.display.losses.comparison import (
    hardest_table,
    kinds_table,
    plot_comparison,
    suspects_table,
    write_suspects,
)
from rsft_lib.display.losses.token_loss_map import STYLES, level_of, show_losses
from rsft_lib.evaluation import loss_comparison, token_loss_cache
from rsft_lib.evaluation.loss_comparison import Suspect, chosen, compare, hardest_spans, suspects, typical
from rsft_lib.evaluation.token_loss_cache import scored
from rsft_lib.evaluation.token_losses import FILE, TokenLosses
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

HARD_TEXT = "解く 👩‍👩‍👧 é <script>alert('x')</script> $x$ & <b>bold</b>\n\tindented"
PROBLEMS, WRONG, HARD, LONG = 60, 7, 9, 11  # the last three are line numbers


def dataset(folder):
    """Problems in both modes, with an invalid record, one that is too long, one with hard text, and a duplicate."""
    records = []
    for problem in demo.problems(PROBLEMS, seed=3):
        for field in ("think", "short"):
            answer = problem[field] if field == "think" else f"<short>{problem[field]}"
            records.append({"instruction": problem["problem"], "output": answer})
    records[WRONG - 1] = {"instruction": "no answer"}
    records[HARD - 1] = {"instruction": HARD_TEXT, "output": f"<think>\n{HARD_TEXT}\n</think>\n\n{HARD_TEXT}"}
    records[LONG - 1]["output"] = "<think>\n" + "one two three " * 300 + "\n</think>\n\nAnswer: two"
    records.append(records[20])
    folder.mkdir()
    for split in ("train", "heldout"):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    model = demo.make_model(folder / "model", seed=1)
    patch_tokenizer(model, folder / "tokenizer", {"<|quad_start|>": "<short>"})
    dataset(folder / "data")
    tokenize(folder / "data" / "train.jsonl", folder / "tokenizer", folder / "tokens", 256, reject_limit=0.5, workers=0)
    return folder


def write_losses(folder, store, seed=0, scale=1.0, change=lambda i, losses: losses):
    """Random losses in the format of scoring: exponentially distributed, then passed through `change`."""
    rng, parts = np.random.default_rng(seed), []
    for i in range(len(store)):
        mask = store[i][1] > 0
        losses = np.where(mask, scale * rng.exponential(size=len(mask)), np.nan).astype(np.float32)
        parts.append(change(i, losses))
    facts = {"made_by": "score", "data": str(store.folder), "data_sha256": file_hash(store.folder / MANIFEST)}
    facts |= {"checkpoint": "", "tokens": 1, "loss": 1.0}
    with new_folder(folder, facts) as temporary:
        np.concatenate(parts).astype(np.float32).tofile(temporary / FILE)
    return TokenLosses(folder)


@pytest.fixture(scope="module")
def comparison(folder):
    store = TokenStore(folder / "tokens")
    before = write_losses(folder / "before", store, seed=1, scale=6)
    return compare(before, write_losses(folder / "after", store, seed=2, scale=0.3))


@pytest.mark.parametrize("chunk", [1, 700, 1 << 24])
def test_sums_by_sample_and_kind_match_a_loop_over_all_tokens(folder, comparison, monkeypatch, chunk):
    monkeypatch.setattr(loss_comparison, "CHUNK", chunk)
    again, sums = compare(comparison.before, comparison.after), np.zeros((3, KINDS))
    control = control_tokens(comparison.store)
    for i in range(len(comparison)):
        ids, mask = comparison.store[i]
        trained = np.flatnonzero(mask > 0)
        before, after = comparison.before[i][trained], comparison.after[i][trained]
        plain = ~np.isin(ids[trained], control.modes)  # all but the control token
        assert again.trained[i] == len(trained) and again.worst[i] == after[plain].max()
        assert again.worst_at[i] == trained[plain][after[plain].argmax()]
        means = [losses[plain].mean() for losses in (before, after)]
        np.testing.assert_allclose([again.loss_before[i], again.loss_after[i]], means, rtol=1e-5)
        own = kinds(ids, mask > 0, control)[trained]
        assert MODE_NAMES[again.modes[i]] == ("think" if control.modes[0] in ids[trained] else "short")
        for kind, b, a in zip(own, before, after, strict=True):
            sums[:, kind] += 1, b, a
        same = [j for j in range(i) if np.array_equal(comparison.store[j][0], ids)]
        assert again.same_as[i] == (same[0] if same else i)
    np.testing.assert_allclose(again.by_kind, sums, rtol=1e-5)


@pytest.mark.parametrize(("width", "chunk"), [(1, 700), (4, 1), (4, 1 << 24), (6, 700), (30, 700), (10_000, 700)])
def test_the_hardest_spans_match_an_exhaustive_search(comparison, monkeypatch, width, chunk):
    monkeypatch.setattr(loss_comparison, "CHUNK", chunk)
    best, control = {}, control_tokens(comparison.store).modes
    for i in range(len(comparison)):
        losses = np.where(np.isin(comparison.store[i][0], control), np.nan, comparison.after[i].astype(np.float64))
        means = {start: losses[start : start + width].mean() for start in range(len(losses) - width + 1)}
        means = {start: mean for start, mean in means.items() if np.isfinite(mean)}
        if means:
            best[i] = max(means, key=means.get), max(means.values())
    expected = [(i, best[i][0]) for i in sorted(best, key=lambda i: -best[i][1])]
    assert hardest_spans(comparison, 5, width) == expected[:5] and hardest_spans(comparison, 1000, width) == expected


def test_exactly_the_manipulated_samples_are_suspect_for_the_right_reasons(folder, comparison):
    think, short = (np.flatnonzero(comparison.modes == MODE_NAMES.index(mode)).tolist() for mode in ("think", "short"))
    rose, outlier, surprise, memorised = think[3], think[8], short[5], short[9]

    def change(i, losses):
        smooth = np.where(np.isfinite(losses), 0.3 + 0.01 * (i % 7), np.nan)
        if i == surprise:
            smooth[np.flatnonzero(np.isfinite(smooth))[-2]] = 9.0
        return smooth * {rose: 20.0, outlier: 3.0, memorised: 0.01}.get(i, 1.0)

    after = write_losses(folder / "manipulated", comparison.store, change=change)
    before = write_losses(
        folder / "constant", comparison.store, change=lambda i, losses: np.where(np.isfinite(losses), 4, np.nan)
    )
    suspected = suspects(compare(before, after))
    by_sample = dict(suspected)
    twice = len(comparison) - 1
    assert by_sample.keys() == {rose, outlier, surprise, memorised, twice}
    assert suspected[0].sample == rose and set(by_sample[rose]) == {"rose", "outlier", "surprise"}
    assert by_sample[outlier] == ("outlier",) and by_sample[memorised] == ("memorised",)
    assert "surprise" in by_sample[surprise] and by_sample[twice] == ("twice",)
    assert chosen(suspected, "twice, memorised") == [s.sample for s in suspected if s.sample in (twice, memorised)]
    with pytest.raises(ValueError, match="'?twise"):
        chosen(suspected, "twise")


def test_control_tokens_and_large_ratios_of_tiny_losses_are_not_suspect(folder, comparison):
    control = control_tokens(comparison.store).modes

    def learned(i, losses):
        tiny = np.where(np.isfinite(losses), 0.001 * (1 + 20 * (i % 9 == 0)), np.nan)
        tiny[np.isin(comparison.store[i][0], control) & np.isfinite(losses)] = 0.7 + 8 * (i % 5 == 0)
        return tiny

    def untrained(i, losses):
        return np.where(np.isfinite(losses), 0.0005, np.nan)

    after = write_losses(folder / "learned", comparison.store, change=learned)
    found = compare(write_losses(folder / "untrained", comparison.store, change=untrained), after)
    assert [suspect.why for suspect in suspects(found)] == [("twice",)]


def test_the_typical_sample_of_a_mode_has_its_median_loss(comparison):
    for number in typical(comparison):
        losses = np.sort(comparison.loss_after[comparison.modes == comparison.modes[number]])
        assert comparison.loss_after[number] == losses[len(losses) // 2]
    assert len(typical(comparison)) == 2


def test_losses_of_different_data_are_not_compared(folder, comparison):
    data, tokenizer = folder / "data" / "heldout.jsonl", folder / "tokenizer"
    tokenize(data, tokenizer, folder / "other", 200, reject_limit=0.5, workers=0)
    other = write_losses(folder / "of_other", TokenStore(folder / "other"))
    with pytest.raises(ValueError, match="different data"):
        compare(comparison.before, other)
    tokenize(data, tokenizer, folder / "other", 150, reject_limit=0.5, workers=0, overwrite=True)
    with pytest.raises(ValueError, match="score again"):
        TokenLosses(folder / "of_other")


def test_losses_are_cached_by_checkpoint(folder, tmp_path, monkeypatch, capsys):
    calls = []

    def score(checkpoint, data, output, nproc):
        calls.append(output)
        write_losses(output, TokenStore(data))

    monkeypatch.setattr(token_loss_cache, "launch_scoring", score)
    checkpoint = tmp_path / "iter_0000001"
    with new_folder(checkpoint, {"made_by": "train", "iteration": 1}):
        pass
    first = scored(checkpoint, folder / "tokens", tmp_path / "after", 1)
    scored(checkpoint, folder / "tokens", tmp_path / "after", 1)
    assert len(calls) == 1 and "using cached losses" in capsys.readouterr().out
    with (calls[0] / FILE).open("r+b") as file:
        file.write(b"damaged")
    scored(checkpoint, folder / "tokens", tmp_path / "after", 1)
    assert len(calls) == 2
    with new_folder(checkpoint, {"made_by": "train", "iteration": 1, "config": "another"}):
        pass
    second = scored(checkpoint, folder / "tokens", tmp_path / "after", 1)
    assert len(calls) == 3 and first.values.filename != second.values.filename


def test_each_sample_maps_to_its_source_line(folder):
    store = TokenStore(folder / "tokens")
    records = [record for _, record in read_records(folder / "data" / "train.jsonl")]
    lines, tokenizer = source_lines(store), load_tokenizer(folder / "tokenizer")
    assert sorted(set(range(1, len(records) + 1)) - set(lines.tolist())) == [WRONG, LONG]
    for sample, line in enumerate(lines.tolist()):
        text = tokenizer.decode(store[sample][0], clean_up_tokenization_spaces=False)
        assert records[line - 1]["instruction"] in text and records[line - 1]["output"] in text


def test_a_filtered_dataset_keeps_the_other_records_byte_for_byte(folder, tmp_path):
    store, out = TokenStore(folder / "tokens"), [0, 30, 117]
    source = folder / "data" / "train.jsonl"
    facts = exclude(store, out, tmp_path / "filtered")
    before, gone = source.read_bytes().splitlines(), set(source_lines(store)[out].tolist())
    after = (tmp_path / "filtered" / "train.jsonl").read_bytes().splitlines()
    assert after == [line for number, line in enumerate(before, start=1) if number not in gone]
    assert facts["counts"] == {"kept": len(before) - 3, "left_out": 3}
    assert (tmp_path / "filtered" / "heldout.jsonl").read_bytes() == (folder / "data" / "heldout.jsonl").read_bytes()
    filtered = tokenize(
        tmp_path / "filtered" / "train.jsonl", folder / "tokenizer", tmp_path / "t", 256, reject_limit=1, workers=0
    )
    assert filtered["counts"]["written"] == len(store) - 3
    assert exclude(store, [], tmp_path / "filtered")["counts"]["left_out"] == 0


def test_a_held_out_split_in_another_format_is_copied(folder, tmp_path):
    (tmp_path / "data").mkdir()
    lines = (folder / "data" / "train.jsonl").read_bytes().splitlines()[:40]
    (tmp_path / "data" / "train.json").write_bytes(b"[" + b",".join(lines) + b"]")
    (tmp_path / "data" / "heldout.jsonl.gz").write_bytes(b"as it is")
    tokenize(tmp_path / "data" / "train.json", folder / "tokenizer", tmp_path / "tokens", reject_limit=0.5, workers=0)
    exclude(TokenStore(tmp_path / "tokens"), [1], tmp_path / "filtered")
    assert (tmp_path / "filtered" / "heldout.jsonl.gz").read_bytes() == b"as it is"
    assert set(splits_of(tmp_path / "filtered")) == {"train", "heldout"}


def test_a_changed_dataset_is_not_filtered(folder, tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    path.write_bytes((folder / "data" / "train.jsonl").read_bytes())
    tokenize(path, folder / "tokenizer", tmp_path / "tokens", 256, reject_limit=0.5, workers=0)
    store = TokenStore(tmp_path / "tokens")
    path.write_bytes(path.read_bytes() + b'{"instruction": "a", "output": "b"}\n')
    with pytest.raises(ValueError, match="has changed since"):
        exclude(store, [1], tmp_path / "filtered")
    assert not (tmp_path / "filtered").exists()
    (tmp_path / "tokens" / ROWS).unlink()
    with pytest.raises(ValueError, match="an older version of this kit wrote it; tokenize again"):
        source_lines(store)


def hard_sample(comparison) -> int:
    return int(np.flatnonzero(source_lines(comparison.store) == HARD)[0])


def plain(page: str) -> str:
    """The text that remains if all tags are stripped, without the losses of hard tokens."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<sub>[^<]*</sub>", "", page)))


def test_multi_token_characters_survive_and_text_is_inert(folder, comparison):
    view = show_losses(comparison, hard_sample(comparison), load_tokenizer(folder / "tokenizer"))
    page = view._repr_html_()
    assert "\ufffd" not in page and "<script" not in page and "<b>bold" not in page
    shown = HARD_TEXT.replace("\n", "↵\n").replace("\t", "⇥\t")
    assert plain(page).count(shown) == 6, "in the question, the thoughts and the answer, before and after"
    answer = "".join(view.text.between(piece.start, piece.end) for piece in view.pieces())
    assert HARD_TEXT in answer and answer.endswith(demo.EOS)
    assert "\ufffd" not in repr(view) and "<script>" in repr(view)


def test_hard_tokens_are_marked_without_colour_and_show_their_loss(folder, comparison):
    view = show_losses(comparison, 0, load_tokenizer(folder / "tokenizer"))
    page = re.sub(r" style='[^']*'", "", view._repr_html_())
    hardest = view.hardest(view.before)[0]
    text = view.text.between(hardest, hardest + 1).strip()
    assert re.search(rf"<b><u>\s*{re.escape(text)}[^<]*</u></b><sub>{view.before[hardest]:.1f}</sub>", page)
    easy = next(p for p in view.pieces() if p.after < 0.1)
    assert f"</u>{easy.after}" not in page and f"{easy.before:.3f} → {easy.after:.3f}" in page
    assert [level_of(x) for x in (0, 0.09, 0.1, 0.6, 2, 4, 50)] == [0, 0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(("ground", "ink"), THEMES)
def test_every_level_is_readable_and_farther_from_the_ground_than_the_previous(ground, ink):
    levels = [over(style, ground) for style in STYLES]
    assert min(contrast(level, ink) for level in levels[:-1]) >= 7 and contrast(levels[-1], "#000000") >= 7
    distances = [contrast(level, ground) for level in levels]
    assert distances == sorted(distances) and len(set(distances)) == len(STYLES)


def test_each_button_of_the_clickable_plot_lies_on_a_point_and_shows_its_sample(folder, comparison):
    suspected = [Suspect(3, ("rose",)), Suspect(5, ("twice",))]
    grid, shown = clickable_plot(comparison, load_tokenizer(folder / "tokenizer"), suspected).children
    picture, *buttons = grid.children
    pixels = plt.imread(BytesIO(picture.value))  # [height, width, RGBA]
    assert len(buttons) == len(comparison) and [button.tooltip for button in buttons[-2:]] == ["sample 5", "sample 3"]
    for button in buttons:
        top, left = (int(button.layout.margin.split()[i].removesuffix("px")) + browse.SIZE // 2 for i in (0, 3))
        assert pixels[top - 1 : top + 2, left - 1 : left + 2, 3].max() > 0.2, button.tooltip
    assert (pixels[..., 3] > 0.2).mean() < 0.2, "the picture is mostly empty, so that a misplaced button is noticed"
    buttons[-2].click()
    assert "sample 5 of" in shown.value and html.escape("an earlier sample has the same tokens") in shown.value


def test_a_long_sample_is_shown_around_its_hardest_token_and_stays_small(folder, tmp_path):
    rows = [{"instruction": "long", "output": "<think>\n" + "one two 解 " * 4000 + "\n</think>\n\nAnswer: two"}] * 2
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize(tmp_path / "long.jsonl", folder / "tokenizer", tmp_path / "tokens", 100_000, workers=0)
    store = TokenStore(tmp_path / "tokens")

    def change(i, losses):
        losses = np.where(np.isfinite(losses), 0.05, np.nan)
        losses[15_000] = 12.0
        return losses

    after = write_losses(tmp_path / "after", store, change=change)
    view = show_losses(
        compare(write_losses(tmp_path / "before", store, scale=5), after), 0, load_tokenizer(folder / "tokenizer")
    )
    assert (
        view.first < 15_000 < view.last
        and np.isfinite(view.after[view.first : view.last]).sum() <= token_loss_map.SHOWN
    )
    assert (
        len(store[0][0]) > 16_000
        and len(view._repr_html_()) < 300_000
        and "more trained tokens are not shown" in view._repr_html_()
    )
    assert "12.000" in repr(view).splitlines()[-token_loss_map.NAMED]


def test_tables_and_plot_have_the_results(folder, comparison, tmp_path):
    tokenizer, suspected = (
        load_tokenizer(folder / "tokenizer"),
        [Suspect(3, ("rose",)), Suspect(hard_sample(comparison), ("twice",))],
    )
    tokens = comparison.by_kind[0].sum()
    assert f"{tokens:,.0f}" in repr(kinds_table(comparison)) and "think" in repr(kinds_table(comparison))
    assert len(hardest_table(comparison, tokenizer, count=6).rows) == 6
    table = suspects_table(comparison, suspected, tokenizer)
    assert "rose: its loss rose" in repr(table) and "<script>alert" not in table._repr_html_()
    bars, points = plot_comparison(comparison, suspected).axes
    assert {"think", "short"} <= {text.get_text() for text in points.get_legend().get_texts()}
    assert "3" in {text.get_text() for text in points.texts} and len(bars.patches) == 2 * len(bars.get_yticks())
    listed = [
        json.loads(line)
        for line in write_suspects(comparison, suspected, tokenizer, tmp_path / "s.jsonl").read_text().splitlines()
    ]
    assert [entry["line"] for entry in listed] == source_lines(comparison.store)[[3, hard_sample(comparison)]].tolist()
    assert listed[0]["why"] == ["rose"] and listed[0]["loss_after"] == pytest.approx(comparison.loss_after[3], abs=1e-4)


def test_a_missing_sample_is_rejected(folder, comparison):
    with pytest.raises(ValueError, match="no sample 1000000"):
        show_losses(comparison, 1_000_000, load_tokenizer(folder / "tokenizer"))
