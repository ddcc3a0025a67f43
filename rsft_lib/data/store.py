"""Tokenized samples on disk, each once and unpadded: Megatron's indexed dataset with a loss mask beside it.

text_document.bin, .idx   token ids, int32, one document per sample (megatron.core.datasets.IndexedDataset)
loss_mask.bin             uint8, one byte per token in the same order; 1 where the token is trained
manifest.json             where they come from, and size and hash of every file
"""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from rsft_lib.artifact import read_manifest

NAME = "text_document"
MASK = "loss_mask.bin"


class StoreWriter:
    """Fills a folder; `close` completes it."""

    def __init__(self, folder: Path):
        # Always int32: megatron-core would choose uint16 for a small vocabulary.
        self.prefix = str(folder / NAME)
        self.builder = IndexedDatasetBuilder(f"{self.prefix}.bin", dtype=np.int32)
        self.mask = (folder / MASK).open("wb")

    def add(self, ids: list[int], loss_mask: list[int]) -> None:
        assert len(ids) == len(loss_mask)
        self.builder.add_item(torch.tensor(ids, dtype=torch.int32))
        self.builder.end_document()
        self.mask.write(np.asarray(loss_mask, dtype=np.uint8).tobytes())

    def close(self) -> None:
        self.builder.finalize(f"{self.prefix}.idx")
        self.mask.close()


class TokenStore:
    """The samples of a folder, memory-mapped: `store[i]` is (tokens int32 [n], loss mask uint8 [n])."""

    def __init__(self, folder: Path):
        """Open a finished folder.

        Raises:
            FileNotFoundError: it was not finished, or a file is missing.
            ValueError: the mask does not fit the tokens.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.tokens = IndexedDataset(str(self.folder / NAME))
        # Copies, here and below: megatron-core unmaps its files when the dataset goes, whoever still looks at them.
        self.lengths = np.array(self.tokens.sequence_lengths)  # int32 [samples]
        self.mask = np.memmap(self.folder / MASK, dtype=np.uint8, mode="r")
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        if len(self.mask) != self.ends[-1]:
            raise ValueError(
                f"{self.folder / MASK} has {len(self.mask)} bytes for {self.ends[-1]} tokens: tokenize again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        end = self.ends[index]
        return np.array(self.tokens[index]), np.array(self.mask[end - self.lengths[index] : end])
