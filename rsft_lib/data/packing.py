"""Assign samples to packs by their lengths: best-fit decreasing."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The sample numbers of each pack: in descending length, each sample goes into the fullest pack that can hold it.

    The free spaces of open packs are the set bits of an integer, so the tightest fit is the lowest set bit at or above
    the sample's length. A million samples take about a second.

    Raises:
        ValueError: a sample is longer than `capacity`.
    """
    packs: list[list[int]] = []
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> pack numbers
    spaces = 0
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[sample])
        if length > capacity:
            raise ValueError(f"sample {sample} needs {length} positions, a pack has {capacity}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = open_packs[space].pop()
            if not open_packs[space]:
                spaces ^= 1 << space
            packs[number].append(sample)
        else:
            space, number = capacity, len(packs)
            packs.append([sample])
        left = space - length
        if left:
            open_packs[left].append(number)
            spaces |= 1 << left
    return packs
