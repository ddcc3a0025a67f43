"""A dataset without some of its records, found again from the samples that they became."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np

from rsft_lib.artifact import new_folder
from rsft_lib.data.records import Source, source_of
from rsft_lib.data.store import LENGTHS, TokenStore
from rsft_lib.paths import resolve


def source_lines(store: TokenStore) -> np.ndarray:
    """The number of the record that each sample was made from, counted from 1 as lines are: int64 [samples].

    Raises:
        ValueError: the store does not tell: it is one shard of several, or samples were cut and others dropped.
    """
    manifest, lengths = store.manifest, np.load(store.folder / LENGTHS)
    options, records = manifest["options"], manifest["counts"]["records"]
    if manifest["shard"] != [0, 1]:
        raise ValueError(f"{store.folder} is shard {manifest['shard']} of several; merge them first")
    accepted = np.setdiff1d(np.arange(1, records + 1), _rejected(store.folder))
    if len(accepted) != len(lengths):
        raise ValueError(
            f"{store.folder}: of {records} records {len(lengths)} were accepted, but its .rejected.jsonl leaves "
            f"{len(accepted)}: it belongs to another run; tokenize again"
        )
    stored = lengths <= options["max_length"] if options["overlong"] == "drop" else np.ones(len(lengths), dtype=bool)
    if stored.sum() != len(store):
        raise ValueError(f"{store.folder}: of what was cut some was dropped; which cannot be told. Use overlong 'drop'")
    return accepted[stored]


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
    split = Path(source.name).name.partition(".")[0] if not source.split else source.split
    facts = {"made_by": "exclude", **source.facts(), "counts": {"kept": 0, "left_out": len(out)}}
    with new_folder(resolve(folder), facts, source=["data"], overwrite=overwrite) as temporary:
        with (temporary / f"{split}.jsonl").open("wb") as file:
            for row in source.rows():
                if row.number not in out:
                    file.write(_line(row.content))
                    facts["counts"]["kept"] += 1
        for other in Path(source.name).parent.glob("*.jsonl") if not source.split else ():
            if other.stem in ("train", "heldout") and other.stem != split:
                shutil.copyfile(other, temporary / other.name)
    return facts


def _source(store: TokenStore) -> Source:
    name, split = store.manifest["data"], ""
    if not Path(name).is_file() and "@" in name:  # as Source writes a dataset on the Hub
        name, _, rest = name.partition(":")
        split, _, revision = rest.partition("@")
        return Source(name, split, revision)
    source = source_of(name, "dataset of the tokens")
    if source.facts()["data_sha256"] != store.manifest["data_sha256"]:
        raise ValueError(f"{name} has changed since {store.folder} was made: tokenize again")
    return source


def _rejected(folder: Path) -> list[int]:
    path = folder.with_name(f"{folder.name}.rejected.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line)["line"] for line in lines]


def _line(content: bytes | dict) -> bytes:
    if isinstance(content, bytes):
        return content.rstrip(b"\r\n") + b"\n"
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"
