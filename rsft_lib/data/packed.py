"""Packed training batches: which samples are in a step, and their tensors with boundaries (`cu_seqlens`).

The order depends only on the seed and the step. Every rank computes the same plan and takes its share, so the global
batches are the same for any data-parallel size.
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

EMPTY = -1  # padding pack: fills up a batch, contains no sample


class PackedDataset:
    """Samples of a store in packs of at most `seq_length` positions, reshuffled every epoch."""

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
        """Plan the packs from the sample lengths.

        Args:
            samples: the samples to use; all by default.
            packing: whether samples share packs; otherwise there is one pack per sample.
            normalize_by: 'token', or 'sample' to scale the loss weights of each sample to sum to 1.
            control: the control tokens from which `kinds` is computed; without them every kind is 0.

        Raises:
            ValueError: the store contains a sample longer than `seq_length` allows.
        """
        samples = range(len(store)) if samples is None else samples
        # A sample of n tokens has n - 1 positions to predict from.
        positions = store.lengths[samples.start : samples.stop].astype(np.int64) - 1
        longest = int(positions.max())
        if longest > seq_length:
            raise ValueError(
                f"{store.folder}: sample {samples[int(positions.argmax())]} has {longest + 1} tokens, seq_length "
                f"{seq_length} allows {seq_length + 1}: raise seq_length or tokenize with a smaller max_length"
            )
        self.store, self.seq_length, self.seed = store, seq_length, seed
        self.normalize_by, self.control = normalize_by, control
        self.weights = getattr(store, "weights", np.float32([0, 1]))  # loss weight of each mask byte
        numbered = pack(positions, seq_length) if packing else [[i] for i in range(len(positions))]
        self.packs = [[samples[i] for i in numbers] for numbers in numbered]
        # Packs differ in attention cost: the square of the length of each sample.
        self.costs = [float((positions[numbers] ** 2).sum()) for numbers in numbered]

    def __len__(self) -> int:
        """Packs per epoch."""
        return len(self.packs)

    @property
    def sample_length(self) -> float:
        """The mean length of the sample that a token of the packs is in."""
        return sum(self.costs) / (len(self) * self.seq_length)

    def plan_sha256(self) -> str:
        """A hash of the assignment of samples to packs; with the seed it determines the batch of every step."""
        ends = np.cumsum([len(samples) for samples in self.packs], dtype=np.int64)
        return hashlib.sha256(np.concatenate([ends, *self.packs]).astype(np.int64).tobytes()).hexdigest()

    def step(self, step: int, batch_size: int) -> list[int]:
        """The packs of global batch `step`, counted from 0; epochs follow one another within batches."""
        first = step * batch_size
        return [self._shuffled(i // len(self))[i % len(self)] for i in range(first, first + batch_size)]

    def once(self, step: int, batch_size: int) -> list[int]:
        """The packs of batch `step` of a single pass; the last batch is padded with EMPTY.

        They are in the shuffled order of the first epoch, since unshuffled packs are sorted by length.
        """
        first = step * batch_size
        return [int(self._shuffled(0)[i]) if i < len(self) else EMPTY for i in range(first, first + batch_size)]

    def samples(self, packs: Sequence[int]) -> list[int]:
        """The sample numbers of `packs`, in order."""
        return [sample for index in packs if index != EMPTY for sample in self.packs[index]]

    def samples_sha256(self, packs: Sequence[int]) -> str:
        """A short hash of `samples(packs)`, to compare batches across ranks and runs."""
        return hashlib.sha256(np.array(self.samples(packs), dtype=np.int64).tobytes()).hexdigest()[:16]

    def cost(self, index: int) -> float:
        """The attention cost of a pack: the sum of its squared sample lengths."""
        return 0.0 if index == EMPTY else self.costs[index]

    def batch(self, packs: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of `packs`, concatenated: `positions` = len(packs) * seq_length in total.

        Returns:
            tokens, labels, position_ids: int64 [1, positions]; position_ids restart with every sample.
            loss_mask: float32 [1, positions]; the loss weight of each label, 0 where it is not trained.
            kinds: int64 [1, positions], see `span_kinds`.
            padding: bool [1, positions], True at positions that belong to no sample.
            cu_seqlens: int32 [samples + 1]; the padding of each pack counts as one untrained sample, but belongs to the
                sample of a pack with a single one: that sample does not see it, and attention is faster in one piece.
        """
        parts = [part for index in packs for part in self._parts(index)]
        tokens, labels, weights, label_kinds = (np.concatenate(column) for column in zip(*parts, strict=True))
        lengths = [len(part[0]) for part in parts]
        ends = [0, *np.cumsum(lengths)]
        if len(packs) == len(self.samples(packs)) == 1:
            ends = [0, ends[-1]]
        return {
            "tokens": torch.from_numpy(tokens).long()[None],
            "labels": torch.from_numpy(labels).long()[None],
            "loss_mask": torch.from_numpy(weights)[None],
            "kinds": torch.from_numpy(label_kinds).long()[None],
            "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
            "padding": torch.from_numpy(self._padding(packs))[None],
            "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        }

    def _parts(self, index: int) -> list[tuple[np.ndarray, ...]]:
        """(tokens, labels, weights, kinds) of each sample of a pack, and of its padding."""
        parts = [self._sample(sample) for sample in self.samples([index])]
        padding = self.seq_length - sum(len(part[0]) for part in parts)
        if padding:
            zeros = np.zeros(padding, dtype=np.int32)
            parts.append((zeros, zeros, zeros.astype(np.float32), zeros.astype(np.uint8)))
        return parts

    def _padding(self, packs: Sequence[int]) -> np.ndarray:
        filled = [sum(int(self.store.lengths[s]) - 1 for s in self.samples([index])) for index in packs]
        return (np.arange(self.seq_length) >= np.array(filled)[:, None]).reshape(-1)

    def _sample(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens, mask = self.store[sample]
        labels, weights = tokens[1:], self.weights[mask[1:]]
        label_kinds = (
            kinds(labels, weights > 0, self.control) if self.control else np.zeros(len(labels), dtype=np.uint8)
        )
        if self.normalize_by == "sample":
            weights = (weights / max(weights.sum(dtype=np.float64), np.finfo(np.float32).tiny)).astype(np.float32)
        return tokens[:-1], labels, weights, label_kinds

    def _shuffled(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._order


def rank_share(
    packs: Sequence[int], costs: Sequence[float], micro_batch_size: int, rank: int, ranks: int
) -> list[list[int]]:
    """The micro-batches of one data-parallel rank, balanced in cost across micro-batches and ranks.

    Longest processing time first (Graham): each item, in descending order of cost, goes to the cheapest group that has
    room. Then items are exchanged between the most expensive and the cheapest group as long as that helps.

    >>> rank_share([0, 1, 2, 3], costs=[9.0, 8.0, 2.0, 1.0], micro_batch_size=1, rank=0, ranks=2)
    [[0], [3]]
    """
    micro_batches = _spread(range(len(packs)), costs, len(packs) // micro_batch_size)
    totals = [sum(costs[i] for i in micro_batch) for micro_batch in micro_batches]
    shares = _spread(range(len(micro_batches)), totals, ranks)
    return [[packs[i] for i in micro_batches[number]] for number in shares[rank]]


def _spread(items: Sequence[int], costs: Sequence[float], count: int) -> list[list[int]]:
    """Partition `items` into `count` groups of equal size and about equal cost."""
    size = len(items) // count
    groups: list[list[int]] = [[] for _ in range(count)]
    cheapest = [(0.0, number) for number in range(count)]
    for item in sorted(items, key=lambda i: -costs[i]):
        cost, number = heapq.heappop(cheapest)
        groups[number].append(item)
        if len(groups[number]) < size:
            heapq.heappush(cheapest, (cost + costs[item], number))
    for _ in items:
        if not _exchange(groups, costs):
            break
    return groups


def _exchange(groups: list[list[int]], costs: Sequence[float]) -> bool:
    """Make the swap that best closes the gap between the cheapest and the most expensive group; False if none helps."""
    by_cost = sorted(groups, key=lambda group: sum(costs[i] for i in group))
    low, high = by_cost[0], by_cost[-1]
    gap = sum(costs[i] for i in high) - sum(costs[i] for i in low)
    new_gap, i, j = min(
        (abs(gap - 2 * (costs[a] - costs[b])), i, j) for i, a in enumerate(high) for j, b in enumerate(low)
    )
    if new_gap >= 0.99 * gap:
        return False
    high[i], low[j] = low[j], high[i]
    return True
