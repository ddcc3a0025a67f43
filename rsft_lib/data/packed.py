"""Packed training batches: which samples make up a step, and their tensors.

The order depends on the seed and the step alone. Every rank computes the same plan and takes its share, so
1, 2 or 64 data-parallel ranks see the same global batches.
"""

import hashlib
import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rsft_lib.data.packing import pack
from rsft_lib.data.span_kinds import Control, kinds
from rsft_lib.data.store import TokenStore

EMPTY = -1  # a pack that fills up a batch and trains nothing


class PackedDataset:
    """Samples of a store in packs of at most `seq_length` positions, shuffled anew every epoch."""

    def __init__(
        self,
        store: TokenStore,
        seq_length: int,
        seed: int,
        *,
        samples: range | None = None,
        packing: bool = True,
        normalize_by: str = "token",
        control: Control | None = None,
    ):
        """Plan the packs from lengths alone.

        Args:
            samples: those to use; all of them by default.
            packing: whether samples share packs; otherwise each has one of its own.
            normalize_by: 'token', or 'sample' to weigh the tokens of a sample so that they sum to 1.
            control: what `kinds` is computed with; without it every kind is 0.

        Raises:
            ValueError: the store holds a sample that does not fit into `seq_length`.
        """
        samples = range(len(store)) if samples is None else samples
        # A sample of n tokens has n - 1 positions to predict from.
        positions = store.lengths[samples.start : samples.stop].astype(np.int64) - 1
        longest = int(positions.max())
        if longest > seq_length:
            raise ValueError(
                f"{store.folder}: sample {samples[int(positions.argmax())]} has {longest + 1} tokens, seq_length "
                f"{seq_length} holds {seq_length + 1}: raise seq_length or tokenize with a smaller max_length"
            )
        self.store, self.seq_length, self.seed = store, seq_length, seed
        self.normalize_by, self.control = normalize_by, control
        self.weights = getattr(store, "weights", np.float32([0, 1]))  # what the bytes of the loss mask stand for
        numbered = pack(positions, seq_length) if packing else [[i] for i in range(len(positions))]
        self.packs = [[samples[i] for i in numbers] for numbers in numbered]
        # Attention is what differs between packs: each sample costs the square of its length.
        self.costs = [float((positions[numbers] ** 2).sum()) for numbers in numbered]

    def __len__(self) -> int:
        """Packs in an epoch."""
        return len(self.packs)

    def plan_sha256(self) -> str:
        """A hash of which samples share a pack; with the seed it decides what every step trains."""
        ends = np.cumsum([len(samples) for samples in self.packs], dtype=np.int64)
        return hashlib.sha256(np.concatenate([ends, *self.packs]).astype(np.int64).tobytes()).hexdigest()

    def step(self, step: int, batch_size: int) -> list[int]:
        """The packs of global batch `step`, counted from 0, through as many epochs as it takes."""
        first = step * batch_size
        return [self._shuffled(i // len(self))[i % len(self)] for i in range(first, first + batch_size)]

    def once(self, step: int, batch_size: int) -> list[int]:
        """The packs of batch `step` of a single pass, the last one filled up with EMPTY.

        In the order of the first epoch: packs are made longest first, so that the first as planned are unlike the rest.
        """
        first = step * batch_size
        return [int(self._shuffled(0)[i]) if i < len(self) else EMPTY for i in range(first, first + batch_size)]

    def samples(self, packs: Sequence[int]) -> list[int]:
        """The sample numbers of some packs, in their order."""
        return [sample for index in packs if index != EMPTY for sample in self.packs[index]]

    def samples_sha256(self, packs: Sequence[int]) -> str:
        """A short hash of `samples`: the same for the same samples in the same order, on any ranks."""
        return hashlib.sha256(np.array(self.samples(packs), dtype=np.int64).tobytes()).hexdigest()[:16]

    def cost(self, index: int) -> float:
        """Sum of squared sample lengths of a pack: what its attention costs."""
        return 0.0 if index == EMPTY else self.costs[index]

    def batch(self, packs: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of `packs`, laid one after the other: `positions` = len(packs) * seq_length in all.

        Returns:
            tokens, labels, position_ids: int64 [1, positions]; position_ids restart with every sample.
            loss_mask: float32 [1, positions]; the weight of each label's loss, 0 where it is not trained.
            kinds: int64 [1, positions], see `span_kinds`.
            cu_seqlens: int32 [samples + 1]; the rest of each pack is a sample of its own that trains nothing.
        """
        parts = [part for index in packs for part in self._parts(index)]
        tokens, labels, weights, found = (np.concatenate(column) for column in zip(*parts, strict=True))
        lengths = [len(part[0]) for part in parts]
        return {
            "tokens": torch.from_numpy(tokens).long()[None],
            "labels": torch.from_numpy(labels).long()[None],
            "loss_mask": torch.from_numpy(weights)[None],
            "kinds": torch.from_numpy(found).long()[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
            "cu_seqlens": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        }

    def _parts(self, index: int) -> list[tuple[np.ndarray, ...]]:
        """(tokens, labels, weights, kinds) of each sample of a pack, and of what is left over."""
        parts = [self._sample(sample) for sample in self.samples([index])]
        left = self.seq_length - sum(len(part[0]) for part in parts)
        if left:
            zeros = np.zeros(left, dtype=np.int32)
            parts.append((zeros, zeros, zeros.astype(np.float32), zeros.astype(np.uint8)))
        return parts

    def _sample(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens, mask = self.store[sample]
        labels, weights = tokens[1:], self.weights[mask[1:]]
        found = kinds(labels, weights > 0, self.control) if self.control else np.zeros(len(labels), dtype=np.uint8)
        if self.normalize_by == "sample":
            weights = (weights / max(weights.sum(dtype=np.float64), np.finfo(np.float32).tiny)).astype(np.float32)
        return tokens[:-1], labels, weights, found

    def _shuffled(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._order


def rank_share(
    packs: Sequence[int], costs: Sequence[float], micro_batch_size: int, rank: int, ranks: int
) -> list[list[int]]:
    """The micro-batches of one data-parallel rank, so that all of them cost about the same, and so all ranks.

    The most expensive first, each to the cheapest place that has room (Graham's longest processing time first), then
    exchanges between the dearest and the cheapest place for as long as they help.

    >>> rank_share([0, 1, 2, 3], costs=[9.0, 8.0, 2.0, 1.0], micro_batch_size=1, rank=0, ranks=2)
    [[0], [3]]
    """
    micro_batches = _spread(range(len(packs)), costs, len(packs) // micro_batch_size)
    totals = [sum(costs[i] for i in micro_batch) for micro_batch in micro_batches]
    shares = _spread(range(len(micro_batches)), totals, ranks)
    return [[packs[i] for i in micro_batches[number]] for number in shares[rank]]


def _spread(items: Sequence[int], costs: Sequence[float], places: int) -> list[list[int]]:
    """Deal out `items` evenly in number, and about evenly in cost: the longest first, then by exchanges."""
    room = len(items) // places
    filled: list[list[int]] = [[] for _ in range(places)]
    cheapest = [(0.0, place) for place in range(places)]
    for item in sorted(items, key=lambda i: -costs[i]):
        cost, place = heapq.heappop(cheapest)
        filled[place].append(item)
        if len(filled[place]) < room:
            heapq.heappush(cheapest, (cost + costs[item], place))
    for _ in items:
        if not _exchange(filled, costs):
            break
    return filled


def _exchange(filled: list[list[int]], costs: Sequence[float]) -> bool:
    """Swap the two items that bring the dearest and the cheapest place nearest to each other; whether any do."""
    by_cost = sorted(filled, key=lambda place: sum(costs[i] for i in place))
    low, high = by_cost[0], by_cost[-1]
    gap = sum(costs[i] for i in high) - sum(costs[i] for i in low)
    left, i, j = min(
        (abs(gap - 2 * (costs[a] - costs[b])), i, j) for i, a in enumerate(high) for j, b in enumerate(low)
    )
    if left >= 0.99 * gap:
        return False
    high[i], low[j] = low[j], high[i]
    return True
