"""Tokenized samples on disk, unpadded: Megatron's indexed dataset and a loss mask.

text_document.bin, .idx   token ids, always int32, one document per sample: megatron.core.datasets.IndexedDataset
loss_mask.bin             uint8, one byte per token in the same order: 0 untrained, 1 trained, others see LOSS_WEIGHTS
lengths.npy               int32, tokens of every accepted record before overlong ones were dropped or truncated
rows.npy                  int64, the record number of every sample, counted from 1
manifest.json             the inputs, and size and hash of every file
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsft_lib.common.artifact import read_manifest
from rsft_lib.common.paths import require_path
from rsft_lib.tokenizer.chat import LOSS_WEIGHTS
from rsft_lib.tokenizer.dialect import Dialect, dialect_of

NAME = "text_document"
MASK = "loss_mask.bin"
LENGTHS = "lengths.npy"
ROWS = "rows.npy"
INDEX = struct.Struct("<9sQB2Q")  # magic, version, code of the dtype, sequences, documents + 1
MAGIC, VERSION, INT32 = b"MMIDIDX\0\0", 1, 4


class StoreWriter:
    """Writes a store into a folder; call `close` at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokens, self.mask = (folder / f"{NAME}.bin").open("wb"), (folder / MASK).open("wb")
        self.lengths: list[NDArray[np.int32]] = []
        self.before: list[NDArray[np.int32]] = []
        self.rows: list[NDArray[np.int64]] = []

    def add(self, ids: Sequence[int], loss_mask: Sequence[int]) -> None:
        """Add one sample, made from the next record."""
        length, row = np.array([len(ids)], dtype=np.int32), np.array([len(self.rows) + 1])
        self.add_block(np.asarray(ids, dtype=np.int32), np.asarray(loss_mask, dtype=np.uint8), length, length, row)

    def add_block(self, tokens: NDArray, loss_mask: NDArray, lengths: NDArray, before: NDArray, rows: NDArray) -> None:
        """Add the samples of one block of records, concatenated.

        Args:
            tokens: int32 [tokens of all samples]
            loss_mask: uint8 [tokens of all samples]
            lengths: int32 [samples]
            before: int32 [records], lengths before overlong ones were dropped or truncated
            rows: int64 [samples], record numbers
        """
        assert len(tokens) == len(loss_mask) == lengths.sum() and len(lengths) == len(rows)
        self.tokens.write(tokens.astype(np.int32, copy=False).data)
        self.mask.write(loss_mask.data)
        self.lengths.append(lengths)
        self.before.append(before)
        self.rows.append(rows)

    def close(self) -> None:
        self.tokens.close()
        self.mask.close()
        _write_index(self.folder / f"{NAME}.idx", _joined(self.lengths, np.int32))
        np.save(self.folder / LENGTHS, _joined(self.before, np.int32))
        np.save(self.folder / ROWS, _joined(self.rows, np.int64))


def _joined(parts: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)


def _write_index(path: Path, lengths: NDArray[np.int32]) -> None:
    """Write the index of int32 [samples] documents of one sequence each.

    The format is that of megatron.core.datasets.indexed_dataset, whose import takes seconds: it loads Transformer
    Engine. After the header come the lengths (int32), the byte at which each sequence begins, and the first sequence of
    each document and their number (both int64).
    """
    begins = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(np.int32).itemsize
    with path.open("wb") as file:
        file.write(INDEX.pack(MAGIC, VERSION, INT32, len(lengths), len(lengths) + 1))
        for part in (lengths, begins, np.arange(len(lengths) + 1, dtype=np.int64)):
            file.write(part.data)


def _read_index(path: Path) -> NDArray[np.int32]:
    """The lengths, int32 [samples], in an index as `_write_index` writes it.

    Raises:
        ValueError: the file is another kind of index, is cut off, or has no samples.
    """
    with path.open("rb") as file:
        *kind, samples, documents = INDEX.unpack(file.read(INDEX.size).ljust(INDEX.size))
        whole = documents == samples + 1 and path.stat().st_size == INDEX.size + 20 * samples + 8
        if kind == [MAGIC, VERSION, INT32] and samples and whole:
            return np.fromfile(file, dtype=np.int32, count=samples)
    raise ValueError(f"{path} is not megatron-core's index of int32 tokens, is cut off or empty: tokenize again")


def is_a_part(manifest: dict) -> bool:
    """Whether a store is one shard of several, which earlier versions wrote on several machines."""
    return manifest.get("shard", [0, 1]) != [0, 1]


class TokenStore:
    """The samples of a folder, memory-mapped: `store[i]` is (tokens int32 [n], loss mask uint8 [n])."""

    weights = LOSS_WEIGHTS
    """Loss weight of each mask byte: float32 [256]."""

    def __init__(self, folder: Path):
        """Open a completed store.

        Raises:
            FileNotFoundError: the store is incomplete, or a file is missing.
            ValueError: tokens or mask do not match the index, or the store is a part of a dataset.
        """
        self.folder = Path(folder)
        require_path(self.folder / f"{NAME}.idx", "tokens")
        self.manifest = read_manifest(self.folder)
        if is_a_part(self.manifest):
            raise ValueError(
                f"{self.folder} holds a part of its dataset, as an older version wrote them: tokenize again"
            )
        self.lengths = _read_index(self.folder / f"{NAME}.idx")  # int32 [samples]
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.tokens, self.mask = self._mapped(f"{NAME}.bin", np.int32), self._mapped(MASK, np.uint8)

    def _mapped(self, name: str, dtype: type) -> np.memmap:
        """A file with a value for each token, memory-mapped."""
        path, tokens = self.folder / name, int(self.ends[-1])
        expected, found = tokens * np.dtype(dtype).itemsize, path.stat().st_size
        if found != expected:
            raise ValueError(f"{path} has {found} bytes, expected {expected} for {tokens} tokens: tokenize again")
        return np.memmap(path, dtype=dtype, mode="r")

    def __reduce__(self):
        return TokenStore, (self.folder,)  # a copy in another process maps the files itself

    @property
    def dialect(self) -> Dialect:
        """The dialect of its answers."""
        return dialect_of(self.manifest.get("options", {}))

    def __len__(self) -> int:
        return len(self.lengths)

    def chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(first, last) samples of chunks of at most `tokens` tokens, or of one sample; `last` is exclusive."""
        begins, first = self.ends - self.lengths, 0
        while first < len(self):
            last = max(first + 1, int(np.searchsorted(self.ends, begins[first] + tokens, side="right")))
            yield first, last
            first = last

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self.ends[index] - self.lengths[index], self.ends[index])
        return np.array(self.tokens[place]), np.array(self.mask[place])  # copies, which may be written to
