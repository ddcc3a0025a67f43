"""Tables of manifests and template changes, and progress bars."""

import sys

import pytest

from rsft_lib import demo
from rsft_lib.common import progress
from rsft_lib.display.data.dataset import counts_table, origin_table
from rsft_lib.display.model.checkpoint_tables import facts_table
from rsft_lib.display.model.template_diff import Difference, changes_table
from rsft_lib.tokenizer.patch import patch_tokenizer


def test_facts_omit_empty_values_and_hashes():
    facts = {
        "made_by": "convert",
        "parameters": 1821888,
        "whole": True,
        "row_means": {},
        "dtype": "",
        "config_sha256": "ab",
    }
    table = facts_table("the checkpoint", facts | {"files": {"a": 1000, "b": 2}})
    assert table.rows == [
        ("made by", "convert"), ("parameters", "1,821,888"), ("whole", "True"), ("files", "a 1,000, b 2"),
    ]  # fmt: skip


def test_counts_of_splits_with_different_fields_share_a_table():
    facts = {"train": {"counts": {"records": 9, "written": 8, "dropped": 1}}, "heldout": {"counts": {"records": 2}}}
    table = counts_table(facts)
    assert table.columns == ("split", "records", "written", "dropped")
    assert table.rows == [("train", 9, 8, 1), ("heldout", 2, 0, 0)]


@pytest.mark.parametrize(
    ("problems", "warned"),
    [
        ({"both": 0, "think_only": 3, "short_only": 4}, True), ({"both": 1, "think_only": 3, "short_only": 4}, False),
        ({"other": 7}, False),
    ],
)  # fmt: skip
def test_a_dataset_without_pairs_is_reported_but_not_one_without_modes(problems, warned):
    records = {"read": 7, "rejected": 0, "disagreeing": 0, "cut": 0}
    table = origin_table({"records": records, "balance": {}, "problems": problems, "findings": {}})
    for text in (repr(table), table._repr_html_()):
        assert ("No problem is answered in both modes" in text) == warned


def test_the_changes_of_a_template_are_shown_complete_and_inert(tmp_path):
    demo.make_model(tmp_path / "model", seed=1)
    patched = patch_tokenizer(tmp_path / "model", tmp_path / "patched", {"<|quad_start|>": "<short>"})
    assert dict(changes_table(patched).rows) == patched["changes"]
    assert repr(Difference(patched["template_diff"])) == patched["template_diff"]
    html = Difference("--- before\n+++ after\n@@ -1 +1,2 @@\n-<script>\n+<b>\n+$x$\n same")._repr_html_()
    assert (
        "1 lines removed, 2 added" in html and "<script>" not in html and "-&lt;script&gt;" in html and " same" in html
    )


def test_a_short_task_prints_nothing_and_a_long_one_clears_its_bar(capsys, monkeypatch):
    with progress.progress("read", "B", total=100) as bar:
        bar.update(100)
    assert "".join(capsys.readouterr()) == ""
    monkeypatch.setattr(progress, "DELAY", 1e-9)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress("read", "B", total=100) as bar:
        bar.mininterval = 0
        bar.update(50)
        bar.update(50)
    shown = capsys.readouterr().err
    assert "read:  50%" in shown and shown.endswith("\r") and shown.rstrip("\r").rpartition("\r")[2].strip() == ""


def test_progress_bars_are_disabled_only_while_a_model_loads(tmp_path, capsys):
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = demo.make_model(tmp_path / "model", seed=1)
    with progress.without_bars():
        AutoModelForCausalLM.from_pretrained(folder)
    assert "%" not in "".join(capsys.readouterr()) and logging.is_progress_bar_enabled()
