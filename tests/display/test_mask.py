"""The mask view shows exactly what is trained, whatever the text of the sample."""

import re
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from contrast import THEMES, contrast, over
from real import REAL, needs_real
from support import to_messages

from rsft_lib import demo
from rsft_lib.common.artifact import new_folder
from rsft_lib.common.visible import visible
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.records import read_records
from rsft_lib.data.store import StoreWriter, TokenStore
from rsft_lib.display.data.sample_stats import measure
from rsft_lib.display.html import Table, inert, tint
from rsft_lib.display.mask.browse import extremes_table, slider
from rsft_lib.display.mask.pack import show_pack
from rsft_lib.display.mask.sample import COLOR, literal_example, show_mask, show_sample
from rsft_lib.display.mask.segments import Forms, Marks, segments
from rsft_lib.display.mask.token_text import FOLD, TokenText
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.dialect import DIALECTS
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

CHATS = "chat_glaive_toolcall.jsonl"
THOUGHT = "<think>\ntwo plus two\n</think>\n\nAnswer: four"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0041]")
HARD = [
    "数学 🙂 解く 日本語テキスト 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 x\u0301 नमस्ते क्षि می‌خواهم",
    "שלום עולם, مرحبا abc \u202eevil\u202c \u2066x\u2069",
    "zero\u200bwidth\ufeff a\u200db \u00adsoft \u2028line\u2029par tag\U000e0041",
    "\x1b[31mred\x1b[0m \x00\x07\x7f\x85 \r\n\ttab",
    "<script>alert(1)</script><img src=x onerror=alert(1)> &amp; &lt; ' \" </pre></div> <!-- -->",
    "[[trained]] ● think  # not a gutter\n  | nor this\n○ context",
    "costs $5 or $6, \\(x\\) and \\[y\\]",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask")
    patch_tokenizer(demo.make_model(folder / "model", seed=0), folder / "patched", {"<|quad_start|>": "<short>"})
    return load_tokenizer(folder / "patched")


def conversation(answer: str, question: str = "How many?", **extra) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]


def shown(tokenizer, messages: list[dict], **how):
    encoded = encode(tokenizer, messages)
    return show_mask(encoded.ids, encoded.loss_mask, tokenizer, **how)


def write_store(folder: Path, tokenizer, chats: list[list[dict]]) -> TokenStore:
    with new_folder(folder, {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        for chat in chats:
            encoded = encode(tokenizer, chat)
            writer.add(encoded.ids, encoded.loss_mask)
        writer.close()
    return TokenStore(folder)


class Page(HTMLParser):
    """HTML as a browser parses it: tags with their attributes, and the text in <pre>."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.blocks, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)
        if tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "pre" in self.open:
            self.blocks[-1] += data


def test_segment_kinds_are_written_out(tokenizer):
    """
    text   <bos> <｜User｜> How many ? <｜Assistant｜> <think> ... </think> ... Answer : four <eos>
    kind   context ---------------------------------- think ------------- answer --------- EOS
    """
    view = shown(tokenizer, conversation(THOUGHT))
    texts = {s.kind: view.text.between(s.start, s.end) for s in view.segments}
    assert texts == {
        "context": f"{demo.BOS}<｜User｜>How many?<｜Assistant｜>", "think": "<think>\ntwo plus two\n</think>",
        "answer": "\n\nAnswer: four", "EOS": demo.EOS,
    }  # fmt: skip
    assert view.mode == "think" and view.remarks == []
    without_colour = Page(view._repr_html_()).text
    for text in (repr(view), without_colour):
        places = [text.index(label) for label in ("○ context", "● think", "● answer", "● EOS")]
        assert places == sorted(places)
    assert [s.kind for s in shown(tokenizer, conversation("<short>four")).segments] == ["context", "short", "EOS"]
    assert shown(tokenizer, conversation("four")).mode == "other"


def test_an_answer_in_a_given_mode_is_shown_in_it_and_without_a_warning(tokenizer):
    view = shown(tokenizer, conversation(THOUGHT, mode_given=True))
    texts = {s.kind: view.text.between(s.start, s.end) for s in view.segments}
    assert texts["context"].endswith("<｜Assistant｜><think>") and texts["think"] == "\ntwo plus two\n</think>"
    assert view.mode == "think" and view.remarks == []
    view = shown(tokenizer, conversation("<short>four", mode_given=True))
    assert [s.kind for s in view.segments] == ["context", "short", "EOS"] and view.mode == "short" and not view.remarks


def test_the_header_counts_tokens_trained_tokens_and_spans(tokenizer):
    chat = conversation("<short>one") + conversation(THOUGHT)
    encoded = encode(tokenizer, chat)
    view = shown(tokenizer, chat, title="sample 7")
    n, trained = len(encoded.ids), sum(encoded.loss_mask)
    assert view.counts == {"tokens": n, "trained": trained, "spans": 2}
    first, last = encoded.loss_mask.index(1), n - 1
    for text in (repr(view), Page(view._repr_html_()).text):
        assert "sample 7" in text and f"{n} tokens, {trained} trained ({trained / n:.1%}) in 2 spans" in text
        assert f"first trained '<short>' at {first} (id {encoded.ids[first]})" in text
        assert f"last '{demo.EOS}' at {last} (id {encoded.ids[last]})" in text


def test_a_mask_that_trains_all_or_nothing_is_an_error(tokenizer):
    encoded = encode(tokenizer, conversation("<short>four"))
    n = len(encoded.ids)
    for mask in ([0] * n, [1] * n, [0] + [1] * (n - 1), [1] + [0] * (n - 1)):
        with pytest.raises(
            ValueError, match=f"sample 3: (0|{n - 1}) of {n - 1} targets are trained, so the mask is wrong"
        ):
            show_mask(encoded.ids, mask, tokenizer, title="sample 3")


@pytest.mark.parametrize(
    ("answer", "edit", "remark"),
    [
        (THOUGHT, lambda ids, mask: (ids[:-1], mask[:-1]), "it does not end with EOS"),
        ("<short>four", lambda ids, mask: (ids, [*mask[:-1], 0]), "EOS at .* ends an answer but is not trained"),
        ("<short>four", lambda ids, mask: (ids, [1, *mask[1:]]), "the first token is marked as trained"),
        ("<think>a<think>b</think>c", None, "contains <think> <think> </think>; expected"),
        ("<think>a</think>b</think>c", None, "contains <think> </think> </think>; expected"),
        ("<think>never closed", None, "contains <think>; expected"),
        ("hm</think>four", None, "contains </think>; expected"),
        ("<short><think>a</think>b", None, "contains <short> <think> </think>; expected"),
        ("<think>\n</think>\n\nfour", None, "empty chain of thought at"),
    ],
)
def test_malformed_samples_get_a_warning(tokenizer, answer, edit, remark):
    encoded = encode(tokenizer, conversation(answer))
    ids, mask = edit(encoded.ids, encoded.loss_mask) if edit else (encoded.ids, encoded.loss_mask)
    view = show_mask(ids, mask, tokenizer)
    assert re.search(remark, "\n".join(view.remarks))
    assert re.search(remark, repr(view)) and re.search(remark, Page(view._repr_html_()).text)


@pytest.mark.parametrize("text", HARD)
def test_hard_text_is_shown_complete_and_inert(tokenizer, text):
    view = shown(tokenizer, conversation(f"<think>{text}</think>{text}", text))
    whole = view.text.between(0, len(view.ids))
    assert whole == tokenizer.decode(view.ids) and text in whole
    page = Page(view._repr_html_())
    assert "".join(page.blocks) == visible(whole).replace("\n", "↵\n").replace("\t", "⇥\t")
    assert {tag for tag, _ in page.tags} <= {
        "div", "b", "pre", "span", "details", "summary", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert {name for _, attributes in page.tags for name in attributes} <= {"style", "title"}
    for output in (view._repr_html_(), repr(view)):
        assert not CONTROLS.search(output)


def test_text_cannot_imitate_the_labels(tokenizer):
    view = shown(tokenizer, conversation(f"<short>x\n  # forged\n\n○ context{'':12}\n  | y", "q\n● EOS"))
    gutters = [line[:4] for line in repr(view).splitlines()[3:] if line and line[0] not in "●○"]
    assert set(gutters) == {"  | ", "  # "} and repr(view).count("\n○ context") == 1


def test_multi_token_graphemes_are_never_split(tokenizer):
    encoded = encode(tokenizer, conversation("<short>" + "👩‍👩‍👧‍👦数x\u0301👍🏽" * 80))
    text = TokenText(np.array(encoded.ids), tokenizer)
    pieces = list(text.pieces(encoded.loss_mask.index(1), len(encoded.ids) - 1))
    assert "".join(piece.text for piece in pieces) == "<short>" + "👩‍👩‍👧‍👦数x\u0301👍🏽" * 80
    assert [p.end for p in pieces[:-1]] == [p.start for p in pieces[1:]]
    for piece in pieces:
        assert "\ufffd" not in piece.text and not piece.text.endswith("\u200d")
        assert not piece.text.startswith(("\u200d", "\u0301", "🏽"))
    folded = [piece.folded for piece in pieces]
    assert any(folded) and not folded[0] and not folded[-1]


def test_ids_show_on_hover_at_a_boundary(tokenizer):
    view = shown(tokenizer, conversation(THOUGHT))
    titles = [
        attributes["title"]
        for tag, attributes in Page(view._repr_html_()).tags
        if tag == "span" and "title" in attributes
    ]
    edge = view.segments[1].start
    for position in (edge - 1, edge, edge + 1, len(view.ids) - 1):
        assert f"{position}, id {view.ids[position]}" in titles


def test_the_label_shift_table_has_the_token_each_position_predicts(tokenizer):
    view = shown(tokenizer, conversation("<short>four"))
    table = view.label_shift()
    edge = view.segments[1].start
    by_position = {row[0]: row[1:] for row in table.rows}
    assert by_position[str(edge - 1)][1] == "'<｜Assistant｜>'" and by_position[str(edge - 1)][3:] == (
        "'<short>'",
        "● yes",
    )
    assert by_position[str(edge - 2)][3:] == ("'<｜Assistant｜>'", "○ no")
    assert by_position[str(len(view.ids) - 2)][3:] == (f"'{demo.EOS}'", "● yes")
    assert str(len(view.ids) - 1) not in by_position  # the last token is never read
    many = shown(tokenizer, [m for i in range(20) for m in conversation(f"<short>{i}")]).label_shift()
    assert "more boundaries are not shown" in many.note and len(many.rows) < 60


def test_loss_weights_are_shown(tokenizer):
    encoded = encode(tokenizer, conversation("<short>one") + conversation("<short>two"))
    mask = [2 * m if i < len(encoded.ids) // 2 else m for i, m in enumerate(encoded.loss_mask)]
    view = show_mask(encoded.ids, mask, tokenizer, weights=(0, 1, 0.5))
    assert "● short × 0.5" in repr(view) and "● times 0.5" in repr(view.label_shift())
    assert view.counts["trained"] == sum(encoded.loss_mask)


def test_segments_match_a_token_by_token_loop(tokenizer):
    marks, forms = Marks.of(tokenizer), Forms.of(tokenizer)
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.choice([*marks, 5, 6, 7], size=rng.integers(2, 30))
        weights = np.repeat(rng.choice([0, 1, 0.5], size=10), 3)[: len(ids)].astype(np.float32)
        kinds, state = [], "answer"
        for token, weight in zip(ids.tolist(), weights.tolist(), strict=True):
            if not weight:
                kinds.append("context")
                state = {marks.think: "think", marks.short: "short"}.get(token, "answer")  # a mode that was given
                continue
            state = {marks.think: "think", marks.short: "short"}.get(token, state)
            kinds.append("EOS" if token == marks.eos else state)
            if token in (marks.end_think, marks.eos):
                state = "answer"
        parts = segments(ids, weights, marks, forms)
        assert [s.kind for s in parts for _ in range(len(s))] == kinds
        assert [s.weight for s in parts for _ in range(len(s))] == weights.tolist()
        if weights.any():
            first = int(np.flatnonzero(weights)[0])
            named = {marks.think: "think", marks.short: "short"}
            given = named.get(int(ids[first - 1]), "other") if first else "other"  # by the prompt
            assert forms.mode_at(ids, first) == named.get(int(ids[first]), given)


@pytest.mark.parametrize(("ground", "ink"), THEMES)
def test_the_text_of_a_light_and_of_a_dark_theme_is_legible_over_every_color(ground, ink):
    assert min(contrast(over(tint(color), ground), ink) for color in COLOR.values()) >= 7


def test_a_long_sample_is_folded_and_its_html_small(tokenizer):
    view = shown(tokenizer, conversation("<think>" + "Ben has two apples, then five. " * 4000 + "</think>four"))
    assert len(view.ids) > 30_000
    html = view._repr_html_()
    assert len(html.encode()) < 150_000
    assert "".join(Page(html).blocks).count("apples") == 4000  # folded, not left out
    assert len(repr(view)) < 4000 and "more tokens" in repr(view)
    assert FOLD < 30_000


def test_samples_are_read_from_disk_and_bad_numbers_rejected(tokenizer, tmp_path):
    chats = [conversation(THOUGHT), conversation("<short>four")]
    store = write_store(tmp_path / "store", tokenizer, chats)
    for i, chat in enumerate(chats):
        read, direct = show_sample(store, i, tokenizer), shown(tokenizer, chat, title=f"sample {i} of 2")
        assert read._repr_html_() == direct._repr_html_() and repr(read) == repr(direct)
    with pytest.raises(ValueError, match="no sample 2: .* has samples 0 to 1"):
        show_sample(store, 2, tokenizer)


def test_a_pack_is_shown_as_its_training_batch(tokenizer, tmp_path):
    store = write_store(tmp_path / "store", tokenizer, [conversation(f"<short>{'four ' * i}") for i in range(1, 9)])
    seq_length = int(store.lengths.max()) * 2 + 20
    dataset = PackedDataset(store, seq_length, seed=0)
    for number, samples in enumerate(dataset.packs):
        batch = {name: tensor.flatten().tolist() for name, tensor in dataset.batch([number]).items()}
        view = show_pack(store, samples, tokenizer, seq_length)
        assert view.cu_seqlens == batch["cu_seqlens"]
        rows = [row for row in view.junctions().rows if row[0].isdigit()]
        assert len(rows) == 4 * min(2, len(samples) - 1)
        for place, position, sample, reads, _, predicts, _, counted in rows:
            at = int(place)
            assert int(position) == batch["position_ids"][at] and int(sample) in samples
            assert (int(reads), int(predicts)) == (batch["tokens"][at], batch["labels"][at])
            assert (counted == "● yes") == bool(batch["loss_mask"][at])
        trained = int(sum(batch["loss_mask"]))
        filled = int((store.lengths[samples] - 1).sum())
        for text in (repr(view), Page(view._repr_html_()).text):
            assert f"{len(samples)} samples in {filled} of {seq_length} positions" in text
            assert f"{trained} in the loss; padding: {seq_length - filled}" in text
    with pytest.raises(ValueError, match="the pack has 20"):
        show_pack(store, [0, 1], tokenizer, 20)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_five_literal_messages_show_every_token_with_its_mask(tokenizer, dialect):
    rows = literal_example(tokenizer, DIALECTS[dialect]).rows
    assert [kind for kind, *_ in rows] == ["○ context", "● trained"] * 2
    for kind, _, mask in rows:
        assert set(mask.split()) == {"1" if kind == "● trained" else "0"}
    assert all(rows[i][1].endswith(repr(tokenizer.eos_token)) for i in (1, 3))
    assert sum(len(mask.split()) for *_, mask in rows) > 30


def test_widgets_filter_by_mode_and_length_and_show_the_static_view(tokenizer, tmp_path):
    store = write_store(
        tmp_path / "store",
        tokenizer,
        [conversation(THOUGHT), conversation("<short>four"), conversation("<short>a" * 1)],
    )
    samples = measure(store, tokenizer)
    rows = extremes_table(store, tokenizer, samples).rows
    assert [row[:4] for row in rows] == [
        ("think", "shortest", "0", 21), ("short", "shortest", "2", 10), ("short", "median", "1", 12),
    ]  # fmt: skip
    box = slider(store, tokenizer, samples)
    (mode_of, lengths), (back, place, forth), html = box.children[0].children, box.children[1].children, box.children[2]
    assert "3 of 3 samples" in html.value and show_sample(store, 0, tokenizer)._repr_html_() in html.value
    mode_of.value = "short"
    assert "2 of 3 samples" in html.value and show_sample(store, 1, tokenizer)._repr_html_() in html.value
    forth.click()
    forth.click()
    assert show_sample(store, 2, tokenizer)._repr_html_() in html.value
    back.click()
    assert show_sample(store, 1, tokenizer)._repr_html_() in html.value and place.value == 0
    forth.click()
    mode_of.value = "think"  # a new filter starts at its first sample
    mode_of.value = "every mode"
    assert place.value == 0 and show_sample(store, 0, tokenizer)._repr_html_() in html.value
    forth.click()
    lengths.value = (0, int(store.lengths.max()) - 1)
    assert place.value == 0 and "2 of 3 samples" in html.value
    lengths.value = (0, 1)
    assert "0 of 3 samples" in html.value


def test_a_table_is_aligned_text_or_inert_html():
    table = Table("costs $1", ("name", "count", "share"), [("数学", 1234567, 0.5), ("<b>$x$</b>", 7, 0.25)], "a note")
    assert repr(table).splitlines() == [
        "costs $1",
        "name             count   share",
        "数学         1,234,567   50.0%",
        "<b>$x$</b>           7   25.0%",
        "a note",
    ]
    page = Page(table._repr_html_())
    assert "<b>$x$</b>" in page.text and "$x$" not in table._repr_html_()
    assert inert("\\(x\\)") == "<span>\\</span>(x<span>\\</span>)"
    assert repr(Table("none", ("a", "b"), [])) == "none"


@needs_real
def test_real_traces_and_chats_are_shown_complete(tmp_path):
    root = Path(REAL)
    patch_tokenizer(root / "tokenizers" / "r1-distill-qwen", tmp_path / "patched", {"<|quad_start|>": "<short>"})
    tokenizer = load_tokenizer(tmp_path / "patched")
    views = []
    for name, count in (("long_planbench_r1.jsonl.gz", 12), ("short_gsm8k_train.jsonl", 12), (CHATS, 60)):
        for place, record in islice(read_records(root / "data" / name), count):
            messages = to_messages(record, place)
            if not any(m.get("tool_calls") or m["role"] == "tool" for m in messages):
                views.append(shown(tokenizer, messages))
    assert len(views) > 40
    for view in views:
        html = view._repr_html_()
        whole = visible(tokenizer.decode(view.ids)).replace("\n", "↵\n").replace("\t", "⇥\t")
        assert "".join(Page(html).blocks) == whole and len(html.encode()) < 150_000
        assert view.remarks == []
    assert {view.mode for view in views} == {"think", "other"}
