"""Which samples share a pack: best-fit decreasing, from lengths alone."""

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sample numbers of each pack: the longest first, each into the fullest pack that still has room for it.

    Free spaces are the set bits of one large integer, so that the tightest fit is its lowest bit at or above the
    sample's length. A million samples take about a second.

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
