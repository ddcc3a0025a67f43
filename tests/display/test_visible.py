"""Text from data and models is displayed inert and complete, wherever it is shown."""

import json
import re
import sys
import unicodedata

import pytest
import torch

from rsft_lib import demo
from rsft_lib.checkpoint.embedding_audit import Audit, Row
from rsft_lib.common.check_table import Checks
from rsft_lib.common.visible import HIDDEN, visible
from rsft_lib.data.rejects import Reject, Rejects
from rsft_lib.display.data.dataset import findings_table, records_table
from rsft_lib.display.html import Table, caption
from rsft_lib.display.model.answers import side_by_side
from rsft_lib.display.model.checkpoint_tables import facts_table, outputs_table
from rsft_lib.display.model.template_diff import Difference, changes_table
from rsft_lib.generation.answer import Answer
from rsft_lib.tokenizer.contract import check_contract
from rsft_lib.tokenizer.patch import patch_tokenizer

ACTING = "\x1b]0;title\x07\x1b[31m \x9b1m \u202egnp.exe\u2066 \x00\x08\x85\u2028 \u200b\ud83d \U000e0041"
READABLE = "العربية שלום ग़\u200cल 👩\u200d👩\u200d👧 1\ufe0f⃣ ☎\ufe0e ᠠ\u180b 👁\ufe0f\u200d🗨\ufe0f e\u0301 – ✓ $5"
TEXT = f"{READABLE} {ACTING}"


def active_characters(text: str) -> set[str]:
    """Control, format, surrogate and separator characters in a text, except tab, line feed and joiners."""
    active = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n", "\t"}
    return active - {"\u200c", "\u200d"}  # in emoji and some scripts


# Default_Ignorable_Code_Point of Unicode 16, DerivedCoreProperties.txt; and BRAILLE PATTERN BLANK.
IGNORABLE = (
    "AD 34F 61C 115F-1160 17B4-17B5 180B-180F 200B-200F 202A-202E 2060-206F 3164 FE00-FE0F FEFF FFA0 FFF0-FFF8 "
    "1BCA0-1BCA3 1D173-1D17A E0000-E0FFF 2800"
)
# Tab and line feed; visible signs of Arabic, Syriac and Kaithi; hieroglyph joiners.
KEPT = "9-A 600-605 6DD 70F 890-891 8E2 110BD 110CD 13430-13455"


def code_points(ranges: str) -> set[str]:
    ends = [[int(end, 16) for end in each.split("-")] for each in ranges.split()]
    return {chr(code) for first, *last in ends for code in range(first, (last or [first])[0] + 1)}


def failing(check) -> str:
    raise ValueError(f"found {TEXT}")


def table_of_checks() -> Checks:
    checks = Checks()
    checks.run("fails", failing, None)
    checks.run("passes", lambda: TEXT)
    return checks


def audit() -> Audit:
    return Audit([Row(TEXT, "input", 1.0, 50.0, [(TEXT, 0.5)])], {"input": torch.ones(3)})


REPORT = {
    "next_tokens": [{"token": TEXT, "transformers": 1.0, "megatron": 1.0}], "logit_difference": 0.0,
    "text": {"transformers": TEXT}, "sentence": TEXT,
}  # fmt: skip
SHOWN = {
    "a table": lambda: Table(TEXT, ("column", TEXT), [(TEXT, 1)], TEXT),
    "facts": lambda: facts_table("facts", {"source": TEXT, "ids": {TEXT: 1}}),
    "checks": table_of_checks,
    "a template diff": lambda: Difference(f"--- before\n+++ after\n+{TEXT}\n-{TEXT}"),
    "changes": lambda: changes_table({"changes": {"tools": TEXT}}),
    "answers": lambda: side_by_side([TEXT], {"think": [Answer(f"<think>{TEXT}</think>{TEXT}", 3, True)]}, 0, [TEXT]),
    "an embedding audit": audit,
    "a verification report": lambda: outputs_table(REPORT),
}


@pytest.mark.parametrize("name", SHOWN)
def test_control_and_bidi_characters_are_shown_as_visible_signs(name):
    shown = SHOWN[name]()
    for page in (repr(shown), shown._repr_html_()):
        assert active_characters(page) == set(), name
        assert "202E" in page or "202e" in page, "replaced, not dropped"
        page.encode()
    assert "العربية שלום" in repr(shown) and "👩\u200d👩\u200d👧" in repr(shown).replace("\\u200d", "\u200d")


def test_control_characters_in_records_and_findings_are_visible(tmp_path):
    text = TEXT.replace("\ud83d", "")
    record = {"mode": "think", "instruction": text, "output": text}
    finding = {"finding": "differ", "problem": text, "answers": [{"place": "a:1", "says": text, "length": 1}]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "findings.jsonl").write_text(json.dumps(finding) + "\n")
    for shown in (records_table(tmp_path / "train.jsonl"), findings_table(tmp_path)):
        assert active_characters(repr(shown) + shown._repr_html_()) == set() and "العربية" in repr(shown)


def test_control_characters_in_a_template_error_are_visible(tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ raise_exception('\x1b[2J\u202e') }}", encoding="utf-8")
    demo.make_model(tmp_path / "model", seed=0)
    patch_tokenizer(tmp_path / "model", tmp_path / "out", {"<|quad_start|>": "<short>"}, template=own)
    checks = check_contract(tmp_path / "out")
    assert active_characters(repr(checks) + checks._repr_html_()) == set() and "␛[2J⟨202E⟩" in repr(checks)
    with pytest.raises(ValueError, match="template renders: .*␛") as broken:
        checks.require("folder")
    assert active_characters(str(broken.value)) == set()


def test_control_characters_in_a_rejection_are_visible(tmp_path):
    with pytest.raises(ValueError, match="␛") as error, Rejects(tmp_path / "out", 0.0) as rejects:
        rejects.add([Reject("data.jsonl", 1, TEXT.replace("\ud83d", ""), "row")], 1)
        rejects.settle(1)
    assert active_characters(str(error.value)) == set()


def test_control_characters_in_a_plot_label_are_visible():
    assert active_characters(caption(TEXT)) == set() and "⟨001B⟩" in caption(TEXT) and r"\$5" in caption(TEXT)


def test_exactly_the_invisible_characters_of_unicode_are_replaced():
    everything = list(map(chr, range(sys.maxunicode + 1)))
    others = {c for c in everything if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    expected = (others | code_points(IGNORABLE)) - code_points(KEPT)
    assert set(HIDDEN.findall("a".join(everything))) == expected
    assert all(re.fullmatch(r"[\u2400-\u241f␡]|⟨[0-9A-F]{4,6}⟩", visible(c)) for c in expected)


@pytest.mark.parametrize(
    "run",
    [
        *("\u200c", "\u200d", "\ufe0e", "\ufe0f", "\u180b"),  # no effect after a Latin letter
        *("ल\u200c\u200c", "ल\u200d\u200d", "ल\u200c\u200d", "ल\u200c\ufe0f"),
        *("❤\ufe0f\ufe0e\ufe0f", "👩\u200d\ufe0f\u200d", "ᠠ\u180b\u180d", "❤\ufe0f\u180b"),
        "❤" + "".join(chr(0xE0100 + byte) for byte in b"hidden"),
    ],
    ids=ascii,
)
def test_joiners_and_selectors_that_can_hide_text_are_visible(run):
    shown = visible(f"a{run}")
    assert "⟨" in shown and not re.search("[\u180b-\u180d\u200c\u200d\ufe0e\ufe0f]{2}|[\U000e0000-\U000e0fff]", shown)


def test_right_to_left_text_and_joined_letters_are_unchanged():
    assert visible(READABLE) == READABLE
    assert visible("a\n\tb") == "a\n\tb"
