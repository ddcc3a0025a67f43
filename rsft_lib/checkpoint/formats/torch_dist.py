"""Read and write megatron-core `torch_dist` checkpoints tensor by tensor, without a model or ranks.

The format is torch's distributed checkpoint plus megatron-core's `metadata.json` and `common.pt`
(megatron/core/dist_checkpointing/strategies): `*.distcp` files are concatenated `torch.save`d tensors, and the pickle
`.metadata` lists the file and byte offset of each part of a weight. torch loads that pickle, and every object that it
lists as a non-tensor, without restriction. The code here and in sharded.py never does: the pickle may only name and
instantiate classes of this format, and everything else is loaded with `weights_only=True`.
"""

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config as serialization

from rsft_lib.checkpoint.lazy_weights import Box, Piece, Weights, data_of, refusal, return_freed_memory
from rsft_lib.common.artifact import WRITERS, read_manifest, verify, verify_files
from rsft_lib.common.hashing_writer import HashedFile

METADATA, COMMON, SUFFIX = ".metadata", "common.pt", ".distcp"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}  # megatron-core's `metadata.json`
FILE_SIZE = 2**29  # bytes after which a new file is started

_OF_THE_FORMAT = {
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """The pure-Python unpickler, since its BUILD opcode, which sets attributes of any object, can be overridden."""

    dispatch: ClassVar[dict[int, Callable]] = pickle._Unpickler.dispatch.copy()

    def find_class(self, module: str, name: str):
        if name not in _OF_THE_FORMAT.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of this format")
        return super().find_class(module, name)

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to external objects")

    def load_build(self):
        built = self.stack[-2]
        if not dataclasses.is_dataclass(type(built)):  # a class, function or enum member is global to the process
            raise pickle.UnpicklingError(
                f"it sets attributes of {built!r}, which is not an instance of a class of this format"
            )
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata` without running any code in it.

    Raises:
        ValueError: it is not a pickle of this format, names a class or function outside of it, lists an object that is
            not a tensor, or refers to a file outside the folder.
    """
    path = Path(folder) / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        _refuse_all_but_tensors(metadata)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is refused: {error}; do not load this checkpoint") from error
    return metadata


def _refuse_all_but_tensors(metadata: Metadata) -> None:
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it contains a {type(metadata).__name__}, expected Metadata")
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if Path(name).name != name or not name.endswith(SUFFIX) or "\0" in name:
            raise pickle.UnpicklingError(f"it refers to {info.relative_path!r}, expected a {SUFFIX} file in the folder")
        if not isinstance(entry := metadata.state_dict_metadata.get(index.fqn), TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{index.fqn} is a {type(entry).__name__}, expected tensors only")
        if not any(chunk.offsets == index.offset for chunk in entry.chunks):
            raise pickle.UnpicklingError(f"it stores a part of {index.fqn} at {index.offset} without its shape")


def read_common(folder: Path) -> dict:
    """The contents of a checkpoint besides sharded tensors: numbers, strings and small tensors in dictionaries.

    Raises:
        ValueError: it contains anything else.
    """
    common = _load(Path(folder) / COMMON)
    if not isinstance(common, dict):
        raise ValueError(f"{Path(folder) / COMMON} is refused: it contains a {type(common).__name__}, expected a dict")
    return common


def check(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Check a checkpoint before it is used: every file with a `wanted` weight, all pickles, and the sizes of all files.

    Raises:
        FileNotFoundError: the checkpoint was not finished, or a file is missing.
        ValueError: a file is damaged, belongs to another checkpoint, or is unsafe.
    """
    check_listing(folder)
    read_common(folder)
    verify_files(
        folder, {i.relative_path for index, i in read_metadata(folder).storage_data.items() if wanted(index.fqn)}
    )


def check_listing(folder: Path) -> None:
    """Check that all files of a checkpoint are there, their sizes, and the hashes of those without tensors.

    Raises:
        FileNotFoundError: the checkpoint was not finished, or a file is missing.
        DamagedError: a file differs from the manifest.
    """
    verify(folder, only=[name for name in read_manifest(folder)["files"] if not name.endswith(SUFFIX)])


def open_weights(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Weights:
    """The `wanted` tensors of a checkpoint, memory-mapped; check it first."""
    parts = {name: listed for name, listed in stored_parts(folder).items() if wanted(name)}
    files = MappedFiles(folder)
    return Weights({name: [files.open(part) for part in listed] for name, listed in parts.items()})


class StoredPart(NamedTuple):
    """A part of a tensor: its place, dtype and shape, without data, and where it is stored."""

    piece: Piece
    info: _StorageInfo


def stored_parts(folder: Path) -> dict[str, list[StoredPart]]:
    """The parts of every tensor of a checkpoint, from its metadata alone."""
    metadata = read_metadata(folder)
    parts: dict[str, list[StoredPart]] = {}
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata[index.fqn]
        shape = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        empty = torch.empty(shape, dtype=entry.properties.dtype, device="meta")
        parts.setdefault(index.fqn, []).append(StoredPart(Piece(tuple(index.offset), empty), info))
    return parts


class MappedFiles:
    """The files of a checkpoint, each memory-mapped when its first part is opened."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files: dict[Path, torch.UntypedStorage] = {}

    def open(self, part: StoredPart) -> Piece:
        """The part with its data."""
        path = self.folder / part.info.relative_path
        if path not in self.files:
            self.files[path] = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        tensor = _mapped(path, part.info, self.files[path])
        if tensor.shape != part.piece.tensor.shape:
            raise ValueError(
                f"{path} at byte {part.info.offset} contains a tensor of shape {tuple(tensor.shape)}, expected "
                f"{tuple(part.piece.tensor.shape)} from {METADATA}"
            )
        return Piece(part.piece.offset, tensor)


def _mapped(path: Path, info: _StorageInfo, mapped: torch.UntypedStorage) -> Tensor:
    """One `torch.save`d tensor of a file, as a view of the mapped file."""
    empty = _load(path, info, map_location="meta")
    if not isinstance(empty, Tensor):
        raise ValueError(f"{path} at byte {info.offset} contains a {type(empty).__name__}, expected a tensor")
    try:
        start = info.offset + empty.untyped_storage()._checkpoint_offset
        stored = mapped[start : start + empty.untyped_storage().nbytes()]
        flat = torch.tensor([], dtype=torch.uint8).set_(stored).view(empty.dtype)
        return flat.as_strided(empty.shape, empty.stride(), empty.storage_offset())
    except Exception as error:  # of a sparse or quantized tensor, one without memory, or a damaged file
        raise ValueError(
            f"{path} at byte {info.offset} does not contain a plain tensor ({type(error).__name__}): it is damaged, or "
            "not from a checkpoint of this kit"
        ) from error


def _load(path: Path, info: _StorageInfo | None = None, map_location: str = "cpu"):
    """Load a `torch.save`d object, a whole file or the part that `info` describes, without running code in it."""
    try:
        with path.open("rb") as file:
            view = _create_file_view(file, info.offset, info.length) if info else file
            return torch.load(view, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # of zip or pickle
        place = f" at byte {info.offset}" if info else ""
        raise ValueError(f"{path}{place} is refused: {refusal(error)}; do not load this checkpoint") from None


def write(folder: Path, weights: Weights, progress: Callable[[int], None] = lambda nbytes: None) -> dict[str, dict]:
    """Write a checkpoint into `folder`, several files concurrently with one block of a weight of each in memory.

    Args:
        progress: called with the number of bytes of every written block.

    Returns:
        The entries of the written files for a manifest.
    """
    return_freed_memory()
    plan = {folder / f"__0_{number}{SUFFIX}": blocks for number, blocks in enumerate(_planned(weights))}
    places, entries = write_files({path: _tensors(weights, blocks, progress) for path, blocks in plan.items()})
    layout: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for name in weights:
        empty, chunks = weights.empty(name), [_chunk(box) for box in weights.cuts(name)]
        layout[name] = TensorStorageMetadata(TensorProperties(dtype=empty.dtype), empty.shape, chunks)
    for path, blocks in plan.items():
        indices = (MetadataIndex(name, _chunk(box).offsets) for name, box in blocks)
        storage |= zip(indices, places[path], strict=True)
    write_metadata(folder, layout, storage)
    write_common(folder, {})
    return entries


def write_metadata(
    folder: Path, layout: dict[str, TensorStorageMetadata], storage: dict[MetadataIndex, _StorageInfo]
) -> None:
    """Write `.metadata`: the shape and parts of each tensor, and where each part is stored."""
    metadata = Metadata(layout, planner_data={name: (name,) for name in layout}, storage_data=storage)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def write_common(folder: Path, common: dict) -> None:
    """Write the contents besides sharded tensors (`common.pt`), and megatron-core's `metadata.json`."""
    torch.save(common, folder / COMMON)
    (folder / "metadata.json").write_text(json.dumps(CONFIG))


def write_files(contents: dict[Path, Iterable[Tensor]]) -> tuple[dict[Path, list[_StorageInfo]], dict]:
    """Write `.distcp` files concurrently.

    Args:
        contents: file -> contiguous tensors on the CPU, to write in order.

    Returns:
        The location of each value in its file, and the entries of the files for a manifest.
    """
    # The manifest's hashes replace torch's checksums. From 2.12 on torch keeps this setting in a context variable.
    with serialization.patch("save.compute_crc32", False), ThreadPoolExecutor(WRITERS) as threads:
        tasks = [threads.submit(copy_context().run, _write_file, path, values) for path, values in contents.items()]
        written = [task.result() for task in tasks]
    places = {path: infos for path, (infos, _) in zip(contents, written, strict=True)}
    return places, {name: entry for _, listing in written for name, entry in listing.items()}


def _write_file(path: Path, tensors: Iterable[Tensor]) -> tuple[list[_StorageInfo], dict]:
    places = []
    with HashedFile(path) as file:
        for tensor in tensors:
            start = file.size
            # Without this, torch would save the whole storage of a view.
            torch.save(torch.frombuffer(data_of(tensor), dtype=tensor.dtype).view(tensor.shape), file)
            places.append(_StorageInfo(path.name, start, file.size - start))
    return places, file.listing()


def _tensors(weights: Weights, blocks: list[tuple[str, Box]], progress: Callable[[int], None]) -> Iterator[Tensor]:
    for name, box in blocks:
        block = weights.read(name, box).contiguous()
        yield block
        progress(block.nbytes)


def _planned(weights: Weights) -> list[list[tuple[str, Box]]]:
    """The blocks of all weights, partitioned into files."""
    plan: list[list[tuple[str, Box]]] = [[]]
    size = 0
    for name in weights:
        row_bytes = weights.empty(name)[:1].nbytes
        for box in weights.cuts(name):
            if size > FILE_SIZE:
                plan.append([])
                size = 0
            plan[-1].append((name, box))
            size += row_bytes * (box[0].stop - box[0].start)
    return plan


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(s.start for s in box), torch.Size(s.stop - s.start for s in box))
