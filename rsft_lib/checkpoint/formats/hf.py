"""Weights of a Hugging Face folder: safetensors or `.bin`, single or sharded, with conversion of names."""

import json
import re
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from rsft_lib.checkpoint.lazy_weights import (
    Piece,
    Weights,
    as_expert,
    data_of,
    of_expert,
    refusal,
    refuse,
    return_freed_memory,
    rows,
)
from rsft_lib.common.artifact import WRITERS, write_json
from rsft_lib.common.hashing_writer import HashedFile
from rsft_lib.model.weight_map import hf_shapes, row_map

FORMATS = ("model.safetensors", "pytorch_model.bin")
SOURCES = [file for single in FORMATS for file in (single, f"{single}.index.json")]  # the precedence of transformers
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # in a safetensors header
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")  # written by old exporters; redundant with config.json


def weight_sources(folder: Path) -> list[str]:
    """The SOURCES in a folder; the first is read, as by transformers, even if another one is newer.

    Raises:
        FileNotFoundError: there are none.
    """
    sources = [name for name in SOURCES if (Path(folder) / name).is_file()]
    if not sources:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(FORMATS)}, single or with an index: download it")
    return sources


def index_of(folder: Path) -> dict[str, str] | str:
    """Tensor -> file for sharded weights; otherwise the name of the single file.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: the index is damaged.
    """
    first = weight_sources(folder)[0]
    return first if first in FORMATS else _read_index(Path(folder) / first)


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files."""
    index = index_of(folder)
    return [index] if isinstance(index, str) else sorted(set(index.values()))


def open_weights(folder: Path, config: PretrainedConfig) -> Weights:
    """The weights of a folder by their Hugging Face names, memory-mapped.

    Raises:
        FileNotFoundError: weights or a shard are missing.
        ValueError: a file is damaged, or the tensors do not match `config`; every difference is listed.
    """
    tensors, problems = _tensors(folder, None)
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name)}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        problems += _untied(tensors)
    refuse(problems + _differences(tensors, hf_shapes(config)), f"tensors of {folder} do not match config.json")
    return Weights.of(tensors)


def open_tensors(folder: Path, names: Collection[str]) -> Weights:
    """The tensors in `names` that a folder has, memory-mapped; `config.json` and other shards are not read.

    Raises:
        FileNotFoundError: weights or a shard are missing.
        ValueError: a file is damaged, or lacks a tensor that the index assigns to it.
    """
    tensors, problems = _tensors(folder, names)
    refuse(problems, f"tensors of {folder} are missing from their shards")
    return Weights.of(tensors)


def _tensors(folder: Path, names: Collection[str] | None) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors of a folder, restricted to `names` unless None; errors of its index)."""
    index = index_of(folder)
    if isinstance(index, str):
        tensors = _open(Path(folder) / index)
        return {name: tensors[name] for name in tensors if names is None or name in names}, []
    placed = {name: file for name, file in index.items() if names is None or name in names}
    opened = {file: _open(Path(folder) / file) for file in sorted(set(placed.values()))}
    problems = [f"{n}: not in {file}, despite the index" for n, file in placed.items() if n not in opened[file]]
    return {name: opened[file][name] for name, file in placed.items() if name in opened[file]}, problems


def as_megatron(weights: Weights, config: PretrainedConfig) -> Weights:
    """Weights by Hugging Face name -> the same by megatron-core's, as views."""
    return _renamed(weights, config, to_hf=False)


def as_hf(weights: Weights, config: PretrainedConfig) -> Weights:
    """Weights by megatron-core name -> the same by Hugging Face's, as views."""
    return _renamed(weights, config, to_hf=True)


def _renamed(weights: Weights, config: PretrainedConfig, to_hf: bool) -> Weights:
    pieces: dict[str, list[Piece]] = {}
    for ours, origins in row_map(config).items():
        for theirs, start, count, at, expert in origins:
            if to_hf:
                stored = weights.pieces[ours] if expert is None else of_expert(weights.pieces[ours], expert)
                pieces.setdefault(theirs, []).extend(rows(stored, at, at + count, at=start))
            else:
                moved = rows(weights.pieces[theirs], start, start + count, at=at)
                pieces.setdefault(ours, []).extend(moved if expert is None else as_expert(moved, expert))
    return Weights(pieces, weights.dtype)


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in names.values()):
            raise ValueError("it refers to a file in another folder")
        return names
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of tensors ({error}): download it again") from error


def _open(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing but listed in the index: download it again")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise TypeError("it contains other objects")
        return tensors
    except Exception as error:  # of safetensors, pickle or zip: the file is incomplete or unsafe
        what = "safetensors file" if isinstance(error, SafetensorError) else "file of tensors only"
        raise ValueError(f"{path} is not a complete {what} ({refusal(error)}): download it again") from None


def _untied(tensors: dict[str, Tensor]) -> list[str]:
    """Remove the copy of a tied head, which some exporters write; report it if it differs from the embedding."""
    head = tensors.pop("lm_head.weight")
    same = torch.equal(head, tensors.get("model.embed_tokens.weight", torch.empty(0)))
    return [] if same else ["lm_head.weight: config.json ties it to the embedding, but it differs from it"]


def _differences(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name}: not described by config.json" for name in sorted(tensors.keys() - expected.keys())]
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name}: missing")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}: shape {tuple(tensor.shape)}, expected {shape} from config.json")
        elif tensor.dtype not in CODES:
            problems.append(f"{name}: {tensor.dtype}, expected bf16, fp16 or fp32; quantized models cannot be read")
    return problems


def write(
    folder: Path, weights: Weights, max_shard_size: str | int, progress: Callable[[int], None] = lambda nbytes: None
) -> dict[str, dict]:
    """Write weights by Hugging Face names as safetensors, sharded with an index if one file would be too large.

    Format: https://github.com/huggingface/safetensors#format (header length, header, data). Several files are written
    concurrently, with one block of a weight of each in memory.

    Args:
        progress: called with the number of bytes of every written block.

    Returns:
        The entries of the written files for a manifest.
    """
    return_freed_memory()
    shards = split_torch_state_dict_into_shards(
        {name: weights.empty(name) for name in weights}, max_shard_size=max_shard_size
    )
    files = shards.filename_to_tensors
    with ThreadPoolExecutor(WRITERS) as threads:
        listings = list(threads.map(lambda file: _write_file(folder / file, weights, files[file], progress), files))
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return {file: entry for listing in listings for file, entry in listing.items()}


def _write_file(path: Path, weights: Weights, names: list[str], progress: Callable[[int], None]) -> dict[str, dict]:
    names = sorted(names, key=lambda name: -weights.empty(name).itemsize)  # aligns every tensor
    with HashedFile(path) as file:
        file.write(_header(weights, names))
        for name in names:
            for block in weights.blocks(name):
                progress(file.write(data_of(block)))
    return file.listing()


def _header(weights: Weights, names: list[str]) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        empty, start = weights.empty(name), end
        end += empty.nbytes
        entries[name] = {"dtype": CODES[empty.dtype], "shape": list(empty.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
