"""Lazily loaded weights: each is a list of memory-mapped pieces, and only the requested part is read."""

import ctypes
import math
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64 * 2**20  # bytes of a weight processed at a time
M_MMAP_THRESHOLD = -3  # mallopt(3)

Box = tuple[slice, ...]


class Piece(NamedTuple):
    """A part of a weight, and the index of its first element in the weight."""

    offset: tuple[int, ...]
    tensor: Tensor


class Weights:
    """Weights by name, independent of their files and layout.

    >>> weights = Weights({"w": [Piece((0, 0), torch.zeros(2, 3)), Piece((2, 0), torch.ones(2, 3))]})
    >>> weights.empty("w").shape, weights.read("w", (slice(1, 3), slice(0, 1))).tolist()
    (torch.Size([4, 3]), [[0.0], [1.0]])
    """

    def __init__(self, pieces: dict[str, list[Piece]], dtype: torch.dtype | None = None):
        """`dtype` is the dtype that `read` returns; None for the one on disk."""
        self.pieces, self.dtype = pieces, dtype

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Weights":
        """Weights of one piece each."""
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
        """The part of a weight within `box`, by default all of it; a view of the file if one piece contains it.

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
        """Cast a part of a weight, and refuse an overflow."""
        cast = tensor.to(dtype)
        if dtype != tensor.dtype and cast.isinf().any() and (cast.isinf() & tensor.isfinite()).any():
            largest = max(p.tensor[p.tensor.isfinite()].abs().max().item() for p in self.pieces[name])
            raise ValueError(
                f"{name}: its largest absolute value, {largest:.5g}, overflows {dtype} (maximum "
                f"{torch.finfo(dtype).max:.5g}); choose bfloat16 or float32"
            )
        return cast

    def cuts(self, name: str, box: Box = ()) -> list[Box]:
        """Split the weight, or the `box` of it, into blocks of whole rows.

        A large piece starts a new block, so that it is not copied.
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
        """Yield the blocks of a weight, or of the `box` of it, in row order and each contiguous."""
        for cut in self.cuts(name, box):
            yield self.read(name, cut).contiguous()


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


def rows(pieces: list[Piece], start: int, stop: int, at: int) -> list[Piece]:
    """Rows `start` to `stop` of a weight, as pieces of another weight in which the first of them is row `at`."""
    everything = slice(0, sys.maxsize)
    parts = (_overlap(piece, (slice(start, stop), *[everything] * (piece.tensor.ndim - 1))) for piece in pieces)
    return [Piece((part.offset[0] + at, *part.offset[1:]), part.tensor) for part in parts if part]


def of_expert(pieces: list[Piece], expert: int) -> list[Piece]:
    """One expert of a weight of stacked experts [experts, rows, columns], as pieces of a matrix."""
    return [
        Piece(piece.offset[1:], piece.tensor[expert - piece.offset[0]])
        for piece in pieces
        if piece.offset[0] <= expert < piece.offset[0] + len(piece.tensor)
    ]


def as_expert(pieces: list[Piece], expert: int) -> list[Piece]:
    """Pieces of a matrix as pieces of the stack of matrices in which it is number `expert`."""
    return [Piece((expert, *piece.offset), piece.tensor[None]) for piece in pieces]


def return_freed_memory() -> None:
    """Make glibc return freed blocks to the system immediately.

    By default it keeps blocks of up to 32 MiB, which accumulate with every layer that is written.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def resized(weights: Weights, names: Iterable[str], count: int) -> Weights:
    """The same weights, with those in `names` truncated or zero-padded to `count` rows."""
    changed = {}
    for name in names:
        stored, *rest = weights.empty(name).shape
        changed[name] = rows(weights.pieces[name], 0, count, at=0)
        if count > stored:
            zero = torch.zeros(1, *rest, dtype=weights.pieces[name][0].tensor.dtype)
            changed[name] += _one(zero.expand(count - stored, *rest), at=stored)  # uses the memory of one row
    return Weights(weights.pieces | changed, weights.dtype)


def grown(weights: Weights, names: Iterable[str], count: int) -> Weights:
    """The same weights, with those in `names` extended to `count` rows, each new one the fp32 mean of the stored rows.

    The mean of all rows makes a new token neither likely nor unlikely:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    changed = {}
    for name in names:
        stored, dtype = len(weights.empty(name)), weights.empty(name).dtype
        if count > stored:
            mean = sum(block.float().sum(dim=0, keepdim=True) for block in weights.blocks(name)) / stored
            new = mean.to(dtype).expand(count - stored, -1)  # uses the memory of one row
            changed[name] = weights.pieces[name] + _one(new, at=stored)
    return Weights(weights.pieces | changed, weights.dtype)


def with_row_means(weights: Weights, names: Iterable[str], means: dict[int, list[int]]) -> Weights:
    """The same weights, with each row `r` of those in `names` replaced by the fp32 mean of the rows `means[r]`."""
    changed = {}
    for name in names:
        pieces, stored = weights.pieces[name], len(weights.empty(name))
        for row, others in means.items():
            averaged = torch.cat([weights.read(name, (slice(r, r + 1), slice(None))) for r in others])
            mean = averaged.float().mean(dim=0, keepdim=True).to(averaged.dtype)
            pieces = rows(pieces, 0, row, at=0) + _one(mean, at=row) + rows(pieces, row + 1, stored, at=row + 1)
        changed[name] = pieces
    return Weights(weights.pieces | changed, weights.dtype)


def refuse(problems: list[str], what: str) -> None:
    """Raise a ValueError that lists the problems, if there are any; `what` describes them."""
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise ValueError(f"{len(problems)} {what}:\n  {shown}")


def _within(box: Box, empty: Tensor) -> Box:
    box = box or (slice(None),) * empty.ndim
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(box, empty.shape, strict=True))


def overlaps(piece: Piece, box: Box) -> bool:
    """Whether a piece contains any element of the box."""
    return _overlap(piece, box) is not None


def _overlap(piece: Piece, box: Box) -> Piece | None:
    """The part of a piece within the box, with its offset in the box."""
    place, cut = [], []
    for offset, size, interval in zip(piece.offset, piece.tensor.shape, box, strict=True):
        start, stop = max(offset, interval.start), min(offset + size, interval.stop)
        if start >= stop:
            return None
        place.append(start - interval.start)
        cut.append(slice(start - offset, stop - offset))
    return Piece(tuple(place), piece.tensor[tuple(cut)])


def _one(tensor: Tensor, at: int) -> list[Piece]:
    return [Piece((at, *[0] * (tensor.ndim - 1)), tensor)]


def refusal(error: Exception) -> str:
    """The message of a `torch.load` error, without torch's advice to allow, and thus run, what was refused."""
    text = str(error)
    if "weights_only" not in text:
        return text
    reason = re.search(r"unsupported .*?(?=\.\s|\.?$)", text, re.IGNORECASE | re.MULTILINE)
    return reason[0] if reason else "it contains more than tensors"
