"""A dataset without some of its records, found again from the samples that they became."""

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
    """The number of the record that each sample was made from, counted from 1 as lines are: int64 [samples].

    Raises:
        ValueError: the store was written before these numbers were kept.
    """
    if not (store.folder / ROWS).is_file():
        raise ValueError(f"{store.folder} has no {ROWS}: an older version of this kit wrote it; tokenize again")
    return np.load(store.folder / ROWS)


def exclude(store: TokenStore, samples: Collection[int], folder: str | Path, overwrite: bool = False) -> dict:
    """Write the dataset that a store was made from, without the records of `samples`, as a folder for notebook 04.

    The other splits beside it are copied as they are.

    Args:
        overwrite: replace `folder` where it was made from another dataset, too.

    Returns:
        The manifest's facts; `counts` tells how many records are kept and left out.

    Raises:
        FileNotFoundError: the dataset is gone.
        FileExistsError: `folder` is something else, or was made from another dataset.
        ValueError: it has changed since, or `source_lines` cannot tell.
    """
    out = set(source_lines(store)[sorted(samples)].tolist())
    source = _source(store)
    split = Path(source.name).name.partition(".")[0]
    if source.split or split not in SPLITS:
        split, others = "train", []
    else:
        named = split_files(Path(source.name).parent)
        others = [path for name, paths in named.items() if name != split for path in paths]
    facts = {"made_by": "exclude", **source.facts(), "counts": {"kept": 0, "left_out": len(out)}}
    with new_folder(resolve(folder), facts, source=["data"], overwrite=overwrite) as temporary:
        with (temporary / f"{split}.jsonl").open("wb") as file:
            for row in source.rows():
                if row.number not in out and not isinstance(row.content, Exception):
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
    """A row on one line, without the columns that JSON cannot hold.

    Outside of strings, where JSON allows them, line breaks mean as much as spaces.
    """
    if isinstance(content, bytes):
        return re.sub(rb"[\r\n]+", b" ", content.strip()) + b"\n"
    content = {name: value for name, value in content.items() if not isinstance(value, Exception)}
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
