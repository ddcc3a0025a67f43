"""Dialects: what is written and recognised, what is trained, and the checks of a chat template."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from real import REAL, needs_real

from rsft_lib import demo
from rsft_lib.common.artifact import read_manifest, write_manifest
from rsft_lib.data.span_kinds import SPAN_NAMES, control_tokens, kinds
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.display.data.sample_stats import measure
from rsft_lib.display.mask.sample import show_sample
from rsft_lib.evaluation.loss_comparison import MODE_NAMES
from rsft_lib.tokenizer.chat import prompt_ids
from rsft_lib.tokenizer.contract import check_contract, require_contract
from rsft_lib.tokenizer.dialect import QWEN3, THINKLESS, dialect_of
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

EMPTY = "<think>\n\n</think>\n\n"
HEADER = "<｜Assistant｜>"
BLOCKS = ("trained", "masked")
ASKS = {"think": " /think", "short": " /no_think", "other": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer without `<short>`, patched for the dialect."""
    folder = tmp_path_factory.mktemp("dialect")
    patch_tokenizer(demo.make_model(folder / "model", seed=0), folder / "tokenizer", {}, dialect="qwen3")
    return folder / "tokenizer"


def qwen3(block: str):
    return dialect_of({"dialect": "qwen3", "empty_block": block})


def random_chat(rng: random.Random) -> tuple[list[dict], list[str]]:
    """(a conversation, the mode of each of its answers)."""
    chat, modes, asked = [], [], "other"
    for _ in range(rng.randint(1, 3)):
        modes.append(rng.choice(["think", "short"] if asked != "other" else [*ASKS]))
        asked = modes[-1]
        answer = rng.choice(["Answer: two", "x </b>", '"4" it is', "数学 🙂", "- a\n\n- b\n\n", EMPTY[7:9] + "a"])
        if asked != "other":
            answer = answer.lstrip()
        thoughts = rng.choice(["hm", "\n", "Start: two.\n\nNow: three.", "  indented"])
        thoughts = thoughts if thoughts.strip() else "so"
        answers = {"think": f"<think>\n{thoughts}\n</think>\n\n{answer}", "short": EMPTY + answer, "other": answer}
        chat.append({"role": "user", "content": rng.choice(["Why?", "", "a /think b", "数"]) + "?" + ASKS[asked]})
        chat.append({"role": "assistant", "content": answers[asked]})
    return chat, modes


def trained_by_hand(text: str, block: str) -> list[bool]:
    """Whether each character of a rendered R1 conversation is trained: from header to EOS, without a masked block."""
    trained, place = [False] * len(text), 0
    while (place := text.find(HEADER, place)) >= 0:
        place += len(HEADER)
        if block == "masked" and text[place:].startswith(EMPTY):
            place += len(EMPTY)
        end = text.index(demo.EOS, place) + len(demo.EOS)
        trained[place:end] = [True] * (end - place)
        place = end
    return trained


@pytest.mark.parametrize("block", BLOCKS)
def test_the_mask_is_that_of_a_second_implementation_and_every_view_knows_the_modes(folder, tmp_path, block):
    rng = random.Random(0)
    chats = [random_chat(rng) for _ in range(200)]
    rows = [{"messages": chat} for chat, _ in chats]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = tokenize(
        tmp_path / "data.jsonl", folder, tmp_path / "tokens", workers=0, dialect="qwen3", empty_block=block
    )
    store, tokenizer = TokenStore(tmp_path / "tokens"), load_tokenizer(folder)
    assert len(store) == len(chats) and store.dialect == qwen3(block)
    control, samples = control_tokens(store), measure(store, tokenizer)
    for i, (chat, modes) in enumerate(chats):
        ids, mask = store[i]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        by_hand = trained_by_hand(text, block)
        assert ids.tolist() == found["input_ids"]
        assert mask.tolist() == [int(all(by_hand[start:end])) for start, end in found["offset_mapping"]]
        # the modes: of each answer in training, of the first one in statistics and the view
        starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
        label_kinds = kinds(ids, mask > 0, control) // len(SPAN_NAMES)
        assert [MODE_NAMES[label_kinds[start]] for start in starts] == modes
        view = show_sample(store, i, tokenizer)
        assert MODE_NAMES[samples.modes[i]] == view.mode == modes[0]
        assert not view.remarks
        answers = [s.kind for s in view.segments if s.kind in ("answer", "short")]
        assert answers == ["short" if mode == "short" else "answer" for mode in modes]
    assert {mode: n["written"] for mode, n in facts["modes"].items()} == {
        mode: sum(modes[0] == mode for _, modes in chats) for mode in {modes[0] for _, modes in chats}
    }


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (["Why? /no_think", "<think>\nhm\n</think>\n\n4"], "asks for '/no_think', but the answer is in mode think"),
        (["Why? /think", EMPTY + "4"], "asks for '/think', but the answer is in mode short"),
        (["Why? /think", "4"], "in mode other"),
        (["Why?\n/no_think\n", "4"], "in mode other"),
        (["Why? /no_think", EMPTY + "4", "And?", "<think>\nhm\n</think>\n\n4"], "message 3: the user asks"),
        (["Why?", "<think></think>4"], "must be exactly"),
        (["Why?", "<think>\n</think>\n\n4"], "must be exactly"),
        (["Why?", EMPTY + "\n4"], "must be exactly"),
        (["Why?", "<short>4"], "contains '<short>'"),
    ],
)  # fmt: skip
def test_a_row_that_would_train_disobedience_or_another_form_is_rejected(folder, tmp_path, chat, reason):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(chat)]
    good = [{"role": "user", "content": "Why? /no_think"}, {"role": "assistant", "content": EMPTY + "4"}]
    rows = [{"messages": good}, {"messages": messages}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenize(tmp_path / "data.jsonl", folder, tmp_path / "out", workers=0, reject_limit=0.6, dialect="qwen3")
    (rejected,) = (tmp_path / "out.rejected.jsonl").read_text().splitlines()
    assert reason in json.loads(rejected)["reason"]


def test_a_separate_chain_of_thought_is_an_answer_to_think_and_context_may_disobey(folder, tmp_path):
    user = {"role": "user", "content": "Why? /think"}
    given = {"role": "assistant", "content": EMPTY + "4", "train": False}
    reasoned = {"role": "assistant", "content": "4", "reasoning_content": "hm"}
    rows = [{"messages": [user, given, user, reasoned]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = tokenize(tmp_path / "data.jsonl", folder, tmp_path / "out", workers=0, dialect="qwen3")
    assert facts["counts"]["written"] == 1 and facts["modes"].keys() == {"think"}


def test_a_prompt_asks_by_the_switch_and_contains_the_block_only_if_it_was_masked(folder):
    tokenizer, chat = load_tokenizer(folder), [{"role": "user", "content": "2 + 2 ? /think"}]
    for mode, asked in (("think", " /think"), ("short", " /no_think"), (None, "")):
        for block in BLOCKS:
            text = tokenizer.decode(prompt_ids(tokenizer, chat, mode, dialect=qwen3(block)))
            given = EMPTY if block == "masked" and mode == "short" else ""
            assert text == f"{demo.BOS}<｜User｜>2 + 2 ?{asked}{HEADER}{given}"


@pytest.mark.parametrize(
    ("text", "plain", "mode"),
    [
        ("Why? /think", "Why?", "think"), ("Why? /no_think \n", "Why?", "short"), ("Why?\n/think", "Why?", "think"),
        ("/no_think", "", "short"), ("cd bin/think", "cd bin/think", None), ("a /no_thinking", "a /no_thinking", None),
        ("Why /think so", "Why /think so", None), ("", "", None), (" code\n", " code\n", None),
    ],
)  # fmt: skip
def test_a_switch_is_a_word_at_the_end_of_a_message(text, plain, mode):
    assert QWEN3.without_switch(text) == (plain, mode)
    assert QWEN3.ask(text, "short") == plain + " /no_think" and QWEN3.ask(text, None) == plain
    assert THINKLESS.ask(text, "short") == text


def test_the_settings_name_a_dialect():
    assert dialect_of({}) == THINKLESS and dialect_of({"dialect": "qwen3"}) == QWEN3
    for wrong, message in (
        ({"dialect": "qwen"}, "dialect is 'qwen'; choose one of thinkless, qwen3"),
        ({"dialect": "qwen3", "empty_block": "mask"}, "empty_block is 'mask'; choose one of trained, masked"),
        ({"empty_block": "masked"}, "answers of the dialect thinkless have no empty think block"),
    ):
        with pytest.raises(ValueError, match=message):
            dialect_of(wrong)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_contract_needs_no_short_token_and_passes_for_a_patched_tokenizer(folder, block):
    checks = check_contract(folder, dialect=qwen3(block))
    assert not checks.failed, checks
    assert {"soft switch survives", "empty block survives", "modes are recognised", "hard switch"} <= {
        check.name for check in checks if check.passed
    }
    with pytest.raises(ValueError, match="one token each"):
        require_contract(folder)  # the dialect of Thinkless needs <short>


def with_template(folder: Path, out: Path, edit) -> Path:
    """A copy of a tokenizer folder with its chat template edited, whose manifest has its hash."""
    shutil.copytree(folder, out)
    path = out / "chat_template.jinja"
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    write_manifest(out, {key: value for key, value in read_manifest(out).items() if key != "files"})
    return out


def no_switch(template: str) -> str:
    return template.replace("+ message.content }}", "+ message.content.removesuffix(' /no_think') }}", 1)


def no_hard_switch(template: str) -> str:
    return template.removesuffix(QWEN3.hard_switch)


def no_block(template: str) -> str:
    """Without the block in long chats."""
    dropped = "message.content.removeprefix('<think>\\n\\n</think>\\n\\n')"
    return template.replace("'' + message.content", f"({dropped} if messages | length > 6 else message.content)")


def always_given(template: str) -> str:
    """A prompt that contains the block whether it is wanted or not."""
    before, header, after = no_hard_switch(template).rpartition("{{- settings.header }}")
    return before + header + "{{- '<think>\\n\\n</think>\\n\\n' }}" + after


def always_thinks(template: str) -> str:
    """Answers without a think block, also tool calls, are given an empty one, as by TRL's template for Qwen3."""
    begin = "{%- generation %}"
    added = "{%- if '</think>' not in (message.content or '') and not message.reasoning_content %}"
    return template.replace(begin, begin + added + "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}")


@pytest.mark.parametrize(
    ("edit", "block", "failed"),
    [
        (always_thinks, "trained", set()),
        (always_thinks, "masked", set()),
        (no_switch, "trained", {"soft switch survives"}),
        (no_hard_switch, "trained", set()),
        (no_hard_switch, "masked", {"hard switch"}),
        (no_block, "trained", {"empty block survives"}),
        (always_given, "trained", {"prompt begins text"}),
    ],
)
def test_a_template_that_breaks_the_dialect_fails_the_contract(folder, tmp_path, edit, block, failed):
    broken = with_template(folder, tmp_path / "broken", edit)
    assert (broken / "chat_template.jinja").read_text() != (folder / "chat_template.jinja").read_text()
    found = {check.name for check in check_contract(broken, dialect=qwen3(block)).failed}
    assert failed <= found and bool(failed) == bool(found), found


def test_a_template_that_adds_empty_thoughts_is_refused_for_other_dialects_with_the_way_out(folder, tmp_path):
    failed = check_contract(with_template(folder, tmp_path / "broken", always_thinks)).failed
    details = {check.name: check.detail for check in failed}
    assert "as the dialect qwen3 needs them (`dialect`)" in details["prompt begins text"]


@needs_real
@pytest.mark.parametrize("block", BLOCKS)
def test_with_a_real_tokenizer_the_line_break_after_think_decides_the_mode(tmp_path, block):
    patch_tokenizer(Path(REAL) / "tokenizers" / "r1-distill-qwen", tmp_path / "tokenizer", {}, dialect="qwen3")
    rows = [("Why? /think", "<think>\nhm\n</think>\n\n4"), ("Why? /no_think", EMPTY + "4\n\n5")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": q, "response": a}) + "\n" for q, a in rows))
    tokenize(
        tmp_path / "data.jsonl", tmp_path / "tokenizer", tmp_path / "out", workers=0, dialect="qwen3", empty_block=block
    )
    store = TokenStore(tmp_path / "out")
    control, loaded = control_tokens(store), load_tokenizer(tmp_path / "tokenizer")
    assert loaded.convert_ids_to_tokens(list(control.modes)) == ["Ċ", "ĊĊ"]
    spans = []
    for ids, mask in (store[0], store[1]):
        names = [SPAN_NAMES[kind % len(SPAN_NAMES)] for kind in kinds(ids, mask > 0, control)[mask > 0]]
        spans.append(names)
    assert spans[0] == ["think", "control", "think", "think", "think", "answer", "answer", "eos"]
    begin = ["think", "control", "think", "answer"] if block == "trained" else []
    assert spans[1] == begin + ["answer"] * 3 + ["eos"]
