"""Packed training batches: which samples make up a step, and their tensors.

The order depends on the seed and the step alone. Every rank computes the same plan and takes its share, so
1, 2 or 64 data-parallel ranks see the same global batches.
"""

import numpy as np
import torch
from torch import Tensor

from rsft_lib.data.packing import pack
from rsft_lib.data.store import TokenStore

EMPTY = -1  # a pack that fills up a batch and trains nothing


class PackedDataset:
    """The samples of a store in packs of at most `seq_length` positions, shuffled anew every epoch."""

    def __init__(self, store: TokenStore, seq_length: int, seed: int):
        """Plan the packs from lengths alone.

        Raises:
            ValueError: the store holds a sample that does not fit into `seq_length`.
        """
        # A sample of n tokens has n - 1 positions to predict from.
        positions = store.lengths - 1
        longest = int(positions.max())
        if longest > seq_length:
            raise ValueError(
                f"{store.folder}: sample {int(positions.argmax())} has {longest + 1} tokens, seq_length {seq_length} "
                f"holds {seq_length + 1}: raise seq_length or tokenize with a smaller max_length"
            )
        self.store, self.seq_length, self.seed = store, seq_length, seed
        self.packs = pack(positions, seq_length)

    def __len__(self) -> int:
        """Packs in an epoch."""
        return len(self.packs)

    def step(self, step: int, batch_size: int) -> list[int]:
        """The packs of global batch `step`, counted from 0, through as many epochs as it takes."""
        first = step * batch_size
        return [self._shuffled(i // len(self))[i % len(self)] for i in range(first, first + batch_size)]

    def in_order(self, step: int, batch_size: int) -> list[int]:
        """The packs of batch `step` in one pass without shuffling, filled up with EMPTY."""
        first = step * batch_size
        return [i if i < len(self) else EMPTY for i in range(first, first + batch_size)]

    def batch(self, packs: list[int]) -> dict[str, Tensor]:
        """The tensors of `packs`, laid one after the other: `positions` = len(packs) * seq_length in all.

        Returns:
            tokens, labels, position_ids: int64 [1, positions]; position_ids restart with every sample.
            loss_mask: float32 [1, positions]; 1 where the label is trained.
            cu_seqlens: int32 [samples + 1]; the rest of each pack is a sample of its own that trains nothing.
        """
        parts = [part for index in packs for part in self._parts(index)]
        tokens, labels, loss_mask = (np.concatenate(column) for column in zip(*parts, strict=True))
        lengths = [len(part[0]) for part in parts]
        return {
            "tokens": torch.from_numpy(tokens).long()[None],
            "labels": torch.from_numpy(labels).long()[None],
            "loss_mask": torch.from_numpy(loss_mask).float()[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        }

    def _parts(self, pack: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, labels, loss mask) of each sample of a pack, and of what is left over."""
        parts, left = [], self.seq_length
        for sample in [] if pack == EMPTY else self.packs[pack]:
            tokens, mask = self.store[sample]
            parts.append((tokens[:-1], tokens[1:], mask[1:]))
            left -= len(tokens) - 1
        if left:
            zeros = np.zeros(left, dtype=np.int32)
            parts.append((zeros, zeros, zeros.astype(np.uint8)))
        return parts

    def _shuffled(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._order


def rank_share(packs: list[int], micro_batch_size: int, rank: int, ranks: int) -> list[list[int]]:
    """The micro-batches of one data-parallel rank: dealt round, so any number of ranks covers the same batch.

    >>> rank_share([0, 1, 2, 3, 4, 5, 6, 7], micro_batch_size=2, rank=1, ranks=2)
    [[2, 3], [6, 7]]
    """
    micro_batches = [packs[i : i + micro_batch_size] for i in range(0, len(packs), micro_batch_size)]
    return micro_batches[rank::ranks]
