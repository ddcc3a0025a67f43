"""The splits that notebook 04 tokenizes, and the folders of the tokens."""

import datetime
import json
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support import ROOT

from rsft_lib.data.exclude import exclude
from rsft_lib.data.records import Row, Source
from rsft_lib.data.splits import splits_of, token_folder
from rsft_lib.data.store import ROWS

LINE = '{"instruction": "x", "output": "<short>y"}\n'


def write(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(LINE)
    return folder


@pytest.mark.parametrize(
    "names", [("train.jsonl", "heldout.jsonl"), ("train.json",), ("train.jsonl.gz", "heldout.parquet")]
)
def test_a_folder_has_a_file_for_each_split(names, tmp_path):
    folder = write(tmp_path / "set", *names, "findings.jsonl", "manifest.json")
    assert splits_of(folder) == {name.split(".")[0]: folder / name for name in names}
    for name in names:
        split = name.split(".")[0]
        expected = folder / f"Tokenized-{split}-tok-512"
        assert token_folder(folder / name, split, "assets/tok", 512) == expected


def test_a_file_or_a_name_on_the_hub_is_all_for_training(tmp_path):
    file = write(tmp_path / "set", "my.data-1.5B.json") / "my.data-1.5B.json"
    assert splits_of(file) == {"train": file}
    assert token_folder(file, "train", "tok", 9) == tmp_path / "set" / "Tokenized-my.data-1.5B-tok-9"
    assert token_folder(file, "train", "tok", 9, tmp_path / "o") == tmp_path / "o" / "Tokenized-my.data-1.5B-tok-9"
    name = "Vinnnf/Hybrid-OpenThoughts2-1M-1.5B"
    assert splits_of(name) == {"train": name}
    place = ROOT / "assets" / "data" / "Vinnnf_Hybrid_OpenThoughts2_1M_1.5B"
    assert token_folder(name, "train", "tok", 9) == place / "Tokenized-train-tok-9"
    assert token_folder(f"{name}:test@v1", "train", "tok", 9) == place / "Tokenized-test-tok-9"
    others = write(tmp_path / "others", "part-1.jsonl", "part-2.jsonl")
    assert splits_of(others) == {"train": others}


@pytest.mark.parametrize("name", ["set@2", "set:x"])
def test_a_folder_whose_name_looks_like_a_revision_keeps_its_tokens_to_itself(name, tmp_path):
    write(tmp_path / "set", "rows.jsonl")
    folder = write(tmp_path / name, "rows.jsonl")
    assert splits_of(folder) == {"train": folder}
    assert token_folder(folder, "train", "tok", 9) == folder / "Tokenized-train-tok-9"


def test_a_folder_without_training_data_names_the_notebook_that_makes_it(tmp_path):
    for folder in (
        write(tmp_path / "a", "heldout.jsonl"),
        write(tmp_path / "b"),
        write(tmp_path / "c", "manifest.json"),
    ):
        with pytest.raises(FileNotFoundError, match="has no train.jsonl: run notebook 03_build_dataset"):
            splits_of(folder)
    for missing in (tmp_path / "none", "assets/data/no-such-dataset", tmp_path / "none.jsonl"):
        with pytest.raises(FileNotFoundError, match="does not exist: run notebook 03_build_dataset"):
            splits_of(missing)
    with pytest.raises(ValueError, match="contains train.jsonl and train.parquet for train; keep one"):
        splits_of(write(tmp_path / "d", "train.jsonl", "train.parquet"))


def made_from(source: Source, folder, rows: int) -> SimpleNamespace:
    """The parts of a token store that `exclude` uses, with one sample per row of `source`."""
    np.save(folder / ROWS, np.arange(1, rows + 1))
    return SimpleNamespace(folder=folder, manifest=source.facts())


def left(store, folder) -> list[dict]:
    exclude(store, [0], folder / "less")
    return [json.loads(line) for line in (folder / "less" / "train.jsonl").read_text().splitlines()]


def test_records_are_excluded_from_a_folder_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (write(tmp_path / "set:x") / "rows.jsonl").write_text(LINE + LINE.replace("x", "z"))
    store = made_from(Source(str(tmp_path / "set:x"), "train", "main"), tmp_path, 2)
    assert left(store, tmp_path) == [{"instruction": "z", "output": "<short>y"}]


def test_records_are_excluded_from_parquet_whatever_its_columns(tmp_path):
    days = pyarrow.array(
        [[(datetime.date(2020, 1, day), "x")] for day in (1, 2)], pyarrow.map_(pyarrow.date32(), "str")
    )
    pyarrow.parquet.write_table(pyarrow.table({"days": days}), tmp_path / "train.parquet")
    assert left(made_from(Source(str(tmp_path / "train.parquet")), tmp_path, 2), tmp_path) == [
        {"days": {"2020-01-02": "x"}}
    ]


def test_records_are_excluded_from_a_dataset_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "rows", lambda source: iter([Row(1, {"a": 1}), Row(2, {"name": str(source)})]))
    store = made_from(Source("org/name", "train", "main"), tmp_path, 2)
    assert left(store, tmp_path) == [{"name": "org/name:train@main"}]
