"""The shards of several machines as the one store that a single machine would have written, byte for byte."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from rsft_lib.artifact import new_folder, verify
from rsft_lib.data.conversation import RULES
from rsft_lib.data.rejects import Reject, Rejects
from rsft_lib.data.store import BLOCKS, LENGTHS, ROWS, StoreWriter, TokenStore
from rsft_lib.paths import existing, resolve

OF_THE_SHARD = {"shard", "encoder", "counts", "modes", "unused_fields", "files", "data", "tokenizer"}


def merge(shards: list[str | Path], folder: str | Path, reject_limit: float = 0.001, overwrite: bool = False) -> dict:
    """Put the shards that `tokenize(..., shard=(i, n))` wrote together, in the order of the records.

    Args:
        shards: the n folders, in any order.
        overwrite: replace `folder` where it was made from other data or another tokenizer, too.

    Returns:
        The facts of the whole, as `tokenize` without shards returns them.

    Raises:
        FileNotFoundError: a shard is missing or was not finished.
        FileExistsError: `folder` is something else, or was made from other data or another tokenizer.
        ValueError: a shard is damaged, was made from other data or with other options, or stands there twice; or
            more than `reject_limit` of all records were rejected.
    """
    folders = [existing(shard, "shard") for shard in shards]
    manifests = {path: verify(path) for path in folders}
    folders.sort(key=lambda path: manifests[path]["shard"][0])
    _check(manifests, folders)
    facts = _whole([manifests[path] for path in folders])
    destination = resolve(folder)
    with (
        new_folder(destination, facts, source=["data", "tokenizer"], overwrite=overwrite) as temporary,
        Rejects(destination, reject_limit) as rejects,
    ):
        writer = StoreWriter(temporary)
        for block in _dealt_back([list(_blocks(path)) for path in folders]):
            writer.add_block(*block())
        writer.close()
        rejects.add(_rejected(folders), facts["counts"]["records"])
        rejects.settle(facts["counts"]["records"])
    return facts


def _check(manifests: dict[Path, dict], folders: list[Path]) -> None:
    first = manifests[folders[0]]
    if first.get("rules") != RULES:
        raise ValueError(f"{folders[0]} was tokenized by another version of this kit: tokenize its shard again")
    for number, path in enumerate(folders):
        found = manifests[path]
        different = [name for name in first if name not in OF_THE_SHARD and found.get(name) != first[name]]
        if different:
            raise ValueError(
                f"{path} and {folders[0]} differ in {', '.join(different)}, so they are not shards of the same data: "
                "tokenize both with the same data, tokenizer and options"
            )
        if found["shard"] != [number, len(folders)]:
            raise ValueError(
                f"{path} is shard {found['shard'][0]} of {found['shard'][1]}, expected {number} of {len(folders)}"
            )


def _whole(manifests: list[dict]) -> dict:
    counts, modes, unused = Counter(), defaultdict(Counter), Counter()
    for manifest in manifests:
        counts.update(manifest["counts"])
        unused.update(manifest["unused_fields"])
        for mode, counted in manifest["modes"].items():
            modes[mode].update(counted)
    facts = {name: value for name, value in manifests[0].items() if name != "files"}
    return facts | {"shard": [0, 1], "counts": counts, "modes": modes, "unused_fields": unused}


def _blocks(folder: Path) -> Iterator:
    """For each block of a shard, a function that reads what `StoreWriter.add_block` takes."""
    store, lengths, rows = TokenStore(folder), np.load(folder / LENGTHS), np.load(folder / ROWS)
    tokens = np.memmap(f"{store.tokens.path_prefix}.bin", dtype=np.int32, mode="r")
    starts = np.concatenate([[0], store.ends])
    sample = record = 0
    for samples, records in np.load(folder / BLOCKS).tolist():
        part = slice(starts[sample], starts[sample + samples])
        own, read = slice(sample, sample + samples), slice(record, record + records)
        yield lambda part=part, own=own, read=read: (
            tokens[part], store.mask[part], store.lengths[own], lengths[read], rows[own],
        )  # fmt: skip
        sample, record = sample + samples, record + records


def _dealt_back(shards: list[list]) -> Iterator:
    return (block for block in chain.from_iterable(zip_longest(*shards)) if block)


def _rejected(folders: list[Path]) -> list[Reject]:
    files = [path.with_name(f"{path.name}.rejected.jsonl") for path in folders]
    found = []
    for file in filter(Path.is_file, files):
        with file.open(encoding="utf-8") as lines:  # not splitlines, which breaks lines at U+2028 too
            found += [Reject(**json.loads(line)) for line in lines]
    return sorted(found)
