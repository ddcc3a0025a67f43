"""Weights as they lie on disk: each a list of memory-mapped pieces, of which only what is asked for is read."""

import ctypes
import math
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64 * 2**20  # bytes of a weight that are handled at one time
M_MMAP_THRESHOLD = -3  # mallopt(3)

Box = tuple[slice, ...]


class Piece(NamedTuple):
    """A part of a weight, and where in the weight its first element stands."""

    offset: tuple[int, ...]
    tensor: Tensor


class Weights:
    """Weights by name, whatever files and layout they come from.

    >>> weights = Weights({"w": [Piece((0, 0), torch.zeros(2, 3)), Piece((2, 0), torch.ones(2, 3))]})
    >>> weights.empty("w").shape, weights.read("w", (slice(1, 3), slice(0, 1))).tolist()
    (torch.Size([4, 3]), [[0.0], [1.0]])
    """

    def __init__(self, pieces: dict[str, list[Piece]], dtype: torch.dtype | None = None):
        """`dtype` is what `read` gives; None for the one on disk."""
        self.pieces, self.dtype = pieces, dtype

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Weights":
        """Weights that are each in one piece."""
        return cls({name: [Piece((0,) * tensor.ndim, tensor)] for name, tensor in tensors.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def empty(self, name: str) -> Tensor:
        """Shape and dtype of a weight without its data: a tensor on the meta device."""
        pieces = self.pieces[name]
        ends = [[o + n for o, n in zip(p.offset, p.tensor.shape, strict=True)] for p in pieces]
        shape = [max(axis) for axis in zip(*ends, strict=True)]
        return torch.empty(shape, dtype=self.dtype or pieces[0].tensor.dtype, device="meta")

    def read(self, name: str, box: Box = ()) -> Tensor:
        """The part of a weight that lies in `box`, by default all of it; a view of the file where one piece has it.

        Raises:
            ValueError: a value overflows the dtype.
        """
        empty = self.empty(name)
        box = _within(box, empty)
        parts = [part for piece in self.pieces[name] if (part := _overlap(piece, box))]
        shape = [s.stop - s.start for s in box]
        if len(parts) == 1 and list(parts[0].tensor.shape) == shape:
            return self._cast(empty.dtype, parts[0].tensor, name)
        whole = torch.empty(shape, dtype=empty.dtype)
        assert sum(p.tensor.numel() for p in parts) == whole.numel(), f"the pieces of {name} leave gaps or overlap"
        for offset, tensor in parts:
            place = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
            whole[place] = self._cast(empty.dtype, tensor, name)
        return whole

    def _cast(self, dtype: torch.dtype, tensor: Tensor, name: str) -> Tensor:
        """A part of a weight, cast; an overflow is refused."""
        found = tensor.to(dtype)
        if dtype != tensor.dtype and found.isinf().any() and (found.isinf() & tensor.isfinite()).any():
            largest = max(p.tensor[p.tensor.isfinite()].abs().max().item() for p in self.pieces[name])
            raise ValueError(
                f"{name}: its largest absolute value, {largest:.5g}, overflows {dtype} (maximum "
                f"{torch.finfo(dtype).max:.5g}); choose bfloat16 or float32"
            )
        return found

    def cuts(self, name: str, box: Box = ()) -> list[Box]:
        """The weight, or the `box` of it, in blocks of whole rows that are handled one at a time.

        A large piece begins a block of its own, and so is not copied.
        """
        empty = self.empty(name)
        rows, *rest = _within(box, empty)
        row_bytes = math.prod(s.stop - s.start for s in rest) * empty.itemsize
        step = max(1, BLOCK // max(1, row_bytes))
        large = (p.offset[0] for p in self.pieces[name] if p.tensor.nbytes >= BLOCK // 8)
        starts = [rows.start, *sorted({row for row in large if rows.start < row < rows.stop}), rows.stop]
        return [
            (slice(start, min(start + step, last)), *rest)
            for first, last in pairwise(starts)
            for start in range(first, last, step)
        ]

    def blocks(self, name: str, box: Box = ()) -> Iterator[Tensor]:
        """Yield the blocks of a weight, or of the `box` of it, one below the other and each contiguous."""
        for cut in self.cuts(name, box):
            yield self.read(name, cut).contiguous()


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


def rows(pieces: list[Piece], start: int, stop: int, at: int) -> list[Piece]:
    """Rows `start` to `stop` of a weight, as a part of another weight in which the first of them is row `at`."""
    everything = slice(0, sys.maxsize)
    found = (_overlap(piece, (slice(start, stop), *[everything] * (piece.tensor.ndim - 1))) for piece in pieces)
    return [Piece((part.offset[0] + at, *part.offset[1:]), part.tensor) for part in found if part]


def return_freed_memory() -> None:
    """Have freed blocks go back to the system at once.

    glibc keeps those of up to 32 MiB, once it has seen some freed, and so more with every layer that is written.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def resized(weights: Weights, names: Iterable[str], count: int) -> Weights:
    """The same weights, those in `names` cut, or filled up with zeros, to `count` rows."""
    changed = {}
    for name in names:
        stored, *rest = weights.empty(name).shape
        changed[name] = rows(weights.pieces[name], 0, count, at=0)
        if count > stored:
            zero = torch.zeros(1, *rest, dtype=weights.pieces[name][0].tensor.dtype)
            changed[name] += _one(zero.expand(count - stored, *rest), at=stored)  # takes the memory of one row
    return Weights(weights.pieces | changed, weights.dtype)


def with_row_means(weights: Weights, names: Iterable[str], means: dict[int, list[int]]) -> Weights:
    """The same weights, where each row `r` of those in `names` is the mean of the rows `means[r]`, taken in fp32."""
    changed = {}
    for name in names:
        pieces, stored = weights.pieces[name], len(weights.empty(name))
        for row, others in means.items():
            taken = torch.cat([weights.read(name, (slice(r, r + 1), slice(None))) for r in others])
            mean = taken.float().mean(dim=0, keepdim=True).to(taken.dtype)
            pieces = rows(pieces, 0, row, at=0) + _one(mean, at=row) + rows(pieces, row + 1, stored, at=row + 1)
        changed[name] = pieces
    return Weights(weights.pieces | changed, weights.dtype)


def refuse(problems: list[str], what: str) -> None:
    """Raise a ValueError that lists the problems, if there are any; `what` says what each of them is."""
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise ValueError(f"{len(problems)} {what}:\n  {shown}")


def _within(box: Box, empty: Tensor) -> Box:
    box = box or (slice(None),) * empty.ndim
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(box, empty.shape, strict=True))


def _overlap(piece: Piece, box: Box) -> Piece | None:
    """What of a piece lies in the box, with its place in the box."""
    place, cut = [], []
    for offset, size, wanted in zip(piece.offset, piece.tensor.shape, box, strict=True):
        start, stop = max(offset, wanted.start), min(offset + size, wanted.stop)
        if start >= stop:
            return None
        place.append(start - wanted.start)
        cut.append(slice(start - offset, stop - offset))
    return Piece(tuple(place), piece.tensor[tuple(cut)])


def _one(tensor: Tensor, at: int) -> list[Piece]:
    return [Piece((at, *[0] * (tensor.ndim - 1)), tensor)]


def refusal(error: Exception) -> str:
    """What an error of `torch.load` says, without torch's advice to allow what was refused, and so to run it."""
    text = str(error)
    if "weights_only" not in text:
        return text
    found = re.search(r"unsupported .*?(?=\.\s|\.?$)", text, re.IGNORECASE | re.MULTILINE)
    return found[0] if found else "it holds more than tensors"
