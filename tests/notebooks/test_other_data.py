"""The notebooks on a ready hybrid dataset, and on a plain dataset without modes."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from chain import STEPS, chained, outputs, pictures
from support import ROOT

from rsft_lib import demo
from rsft_lib.checkpoint.convert import convert
from rsft_lib.data.store import TokenStore
from rsft_lib.notebook import run
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

NOTEBOOKS = ROOT / "notebooks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The outputs of notebooks 01 and 02."""
    folder = tmp_path_factory.mktemp("other")
    demo.make_model(folder / "model", seed=1)
    patch_tokenizer(folder / "model", folder / "tokenizer", {"<|quad_start|>": "<short>"})
    convert(folder / "model", folder / "megatron")
    return folder


def test_a_plain_dataset_runs_from_03_to_08_without_mention_of_modes(folder):
    """A JSON list without control tokens, as in standard supervised fine-tuning."""
    problems = demo.problems(60, seed=1)
    rows = [
        {"instruction": p["problem"], "output": p["short"], "system": "Be brief.", "topic": "sums"} for p in problems
    ]
    (folder / "plain.json").write_text(json.dumps(rows))
    given = chained(folder)
    given["03_build_dataset"] = {
        "hybrid": str(folder / "plain.json"), "output": str(folder / "hybrid"), "tokenizer": str(folder / "tokenizer"),
    }  # fmt: skip
    given["05_train"]["nproc"] = 1
    done = {name: run(NOTEBOOKS / f"{name}.ipynb", folder / "executed", given[name]) for name in list(given)[2:]}
    status = {name: result[1] for name, result in done.items()}
    assert status["03_build_dataset"]["counts"] == {"train": {"other": 54}, "heldout": {"other": 6}}
    assert status["03_build_dataset"]["unused_fields"] == {"topic": 60}
    assert status["05_train"]["iteration"] == STEPS and status["07_export_and_generate"]["scores"].keys() == {"other"}
    assert status["07_export_and_generate"]["choices"] == {}
    titles = {"04_tokenize_and_inspect": "other", "06_loss_curves": "every setting"}
    for name, (executed, _) in done.items():
        text = "".join(str(output.get("text", "")) + str(output.get("data", {})) for output in outputs(executed))
        assert "think 0" not in text and "<b>think" not in text and "free choice" not in text, name
        assert titles.get(name, "") == "" or pictures(executed), name
    store, card = TokenStore(Path(status["04_tokenize_and_inspect"]["folders"]["train"])), folder / "out" / "README.md"
    decoded = load_tokenizer(folder / "tokenizer").decode(store[0][0])
    assert decoded.startswith(f"{demo.BOS}Be brief.<｜User｜>") and "<short>" not in decoded
    assert "two modes" not in card.read_text() and "<short>" not in card.read_text()


def test_a_ready_dataset_runs_through_03_or_directly_into_04(folder, tmp_path):
    rows = [
        {"instruction": p["problem"], "output": answer}
        for p in demo.problems(40, seed=2) for answer in (p["think"], f"<short>{p['short']}")
    ]  # fmt: skip
    table = {name: [row[name] for row in rows] for name in ("instruction", "output")}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "ready.parquet")
    tokenizer = str(folder / "tokenizer")
    given = {"hybrid": str(tmp_path / "ready.parquet"), "output": str(tmp_path / "out"), "tokenizer": tokenizer}
    _, built = run(NOTEBOOKS / "03_build_dataset.ipynb", tmp_path, given)
    assert built["counts"] == {"train": {"think": 36, "short": 36}, "heldout": {"think": 4, "short": 4}}
    given = {"data": str(tmp_path / "ready.parquet"), "output": str(tmp_path / "tokens"), "tokenizer": tokenizer}
    _, direct = run(NOTEBOOKS / "04_tokenize_and_inspect.ipynb", tmp_path, given)
    assert direct["folders"] == {"train": str(tmp_path / "tokens" / "Tokenized-ready-tokenizer-513")}
    assert len(TokenStore(Path(direct["folders"]["train"]))) == 80
