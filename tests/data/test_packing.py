"""Assigning samples to packs."""

import random

import pytest

from rsft_lib.data.packing import pack


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    packs, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [space for space in free if space >= lengths[i]]
        if fitting:
            number = max(n for n, space in enumerate(free) if space == min(fitting))
        else:
            number = len(packs)
            packs.append([])
            free.append(capacity)
        packs[number].append(i)
        free[number] -= lengths[i]
    return packs


def test_packing_is_best_fit_decreasing_and_loses_nothing():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 60))]
        found, expected = pack(lengths, 40), best_fit_decreasing(lengths, 40)
        assert sorted(i for p in found for i in p) == list(range(len(lengths)))
        fills = [sorted(sum(lengths[i] for i in p) for p in packs) for packs in (found, expected)]
        assert fills[0] == fills[1]
    with pytest.raises(ValueError, match="sample 1 needs 41 positions, a pack has 40"):
        pack([1, 41], 40)
