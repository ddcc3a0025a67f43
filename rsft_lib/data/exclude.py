"""Copy a dataset without the records of selected samples."""

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from rsft_lib.common.artifact import new_folder
from rsft_lib.common.paths import resolve
from rsft_lib.data.records import Source, source_of
from rsft_lib.data.splits import SPLITS, split_files
from rsft_lib.data.store import ROWS, TokenStore


def source_lines(store: TokenStore) -> np.ndarray:
    """The record number of each sample, counted from 1 like lines: int64 [samples].

    Raises:
        ValueError: the store was written by a version that did not save these numbers.
    """
    if not (store.folder / ROWS).is_file():
        raise ValueError(f"{store.folder} has no {ROWS}: an older version of this kit wrote it; tokenize again")
    return np.load(store.folder / ROWS)


def exclude(store: TokenStore, samples: Collection[int], folder: str | Path, overwrite: bool = False) -> dict:
    """Write the dataset of a store without the records of `samples`, as a folder for notebook 04.

    Its other splits are copied unchanged.

    Args:
        overwrite: also replace a `folder` made from another dataset.

    Returns:
        The manifest; `counts` has the number of records kept and left out.

    Raises:
        FileNotFoundError: the dataset no longer exists.
        FileExistsError: `folder` is something else, or was made from another dataset.
        ValueError: the dataset has changed since, or the store has no record numbers.
    """
    excluded = set(source_lines(store)[sorted(samples)].tolist())
    source = _source(store)
    split = Path(source.name).name.partition(".")[0]
    if source.split or split not in SPLITS:
        split, others = "train", []
    else:
        files = split_files(Path(source.name).parent)
        others = [path for name, paths in files.items() if name != split for path in paths]
    facts: dict = {"made_by": "exclude", **source.facts(), "counts": {"kept": 0, "left_out": len(excluded)}}
    with new_folder(resolve(folder), facts, source=["data"], overwrite=overwrite) as temporary:
        with (temporary / f"{split}.jsonl").open("wb") as file:
            for row in source.rows():
                if row.number not in excluded and not isinstance(row.content, Exception):
                    file.write(_line(row.content))
                    facts["counts"]["kept"] += 1
        for other in others:
            shutil.copyfile(other, temporary / other.name)
    return facts


def _source(store: TokenStore) -> Source:
    name = store.manifest["data"]
    source = source_of(name, "dataset of the tokens")
    if source.facts()["data_sha256"] != store.manifest["data_sha256"]:
        raise ValueError(f"{name} has changed since {store.folder} was made: tokenize again")
    return source


def _line(content: bytes | dict) -> bytes:
    """A row as one line, without the columns that JSON cannot represent.

    JSON allows line breaks only between tokens, where they are equivalent to spaces.
    """
    if isinstance(content, bytes):
        return re.sub(rb"[\r\n]+", b" ", content.strip()) + b"\n"
    content = {name: value for name, value in content.items() if not isinstance(value, Exception)}
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
