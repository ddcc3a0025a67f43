"""Tokenized samples on disk, unpadded: Megatron's indexed dataset and a loss mask.

text_document.bin, .idx   token ids, int32, one document per sample (megatron.core.datasets.IndexedDataset)
loss_mask.bin             uint8, one byte per token in the same order: 0 untrained, 1 trained, others see LOSS_WEIGHTS
lengths.npy               int32, tokens of every accepted record before overlong ones were dropped or truncated
rows.npy                  int64, the record number of every sample, counted from 1
manifest.json             the inputs, and size and hash of every file
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from rsft_lib.common.artifact import read_manifest
from rsft_lib.common.paths import require_path
from rsft_lib.tokenizer.chat import LOSS_WEIGHTS
from rsft_lib.tokenizer.dialect import Dialect, dialect_of

NAME = "text_document"
MASK = "loss_mask.bin"
LENGTHS = "lengths.npy"
ROWS = "rows.npy"


class StoreWriter:
    """Writes a store into a folder; call `close` at the end."""

    def __init__(self, folder: Path):
        # Always int32; megatron-core would choose uint16 for a small vocabulary.
        self.folder, self.prefix = folder, str(folder / NAME)
        self.builder = IndexedDatasetBuilder(f"{self.prefix}.bin", dtype=np.int32)
        self.mask = (folder / MASK).open("wb")
        self.lengths: list[NDArray[np.int32]] = []
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
        self.builder.data_file.write(tokens.astype(np.int32, copy=False).data)
        documents = len(self.builder.sequence_lengths)
        self.builder.sequence_lengths.extend(lengths.tolist())
        self.builder.document_indices.extend(range(documents + 1, documents + len(lengths) + 1))
        self.mask.write(loss_mask.data)
        self.lengths.append(before)
        self.rows.append(rows)

    def close(self) -> None:
        self.builder.finalize(f"{self.prefix}.idx")
        self.mask.close()
        np.save(self.folder / LENGTHS, np.concatenate([*self.lengths, np.zeros(0, dtype=np.int32)]))
        np.save(self.folder / ROWS, np.concatenate([*self.rows, np.zeros(0, dtype=np.int64)]))


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
            ValueError: the mask does not match the tokens, or the store is a part of a dataset.
        """
        self.folder = Path(folder)
        require_path(self.folder / f"{NAME}.idx", "tokens")
        self.manifest = read_manifest(self.folder)
        if is_a_part(self.manifest):
            raise ValueError(
                f"{self.folder} holds a part of its dataset, as an older version wrote them: tokenize again"
            )
        self.tokens = IndexedDataset(str(self.folder / NAME))
        # Copied, here and below: megatron-core unmaps its files with the dataset, even if views of them remain.
        self.lengths = np.array(self.tokens.sequence_lengths)  # int32 [samples]
        self.mask = np.memmap(self.folder / MASK, dtype=np.uint8, mode="r")
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        if len(self.mask) != self.ends[-1]:
            raise ValueError(
                f"{self.folder / MASK} has {len(self.mask)} bytes, expected one for each of {self.ends[-1]} tokens: "
                "tokenize again"
            )

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
        end = self.ends[index]
        return np.array(self.tokens[index]), np.array(self.mask[end - self.lengths[index] : end])
