"""Hugging Face -> Megatron: a model folder becomes a `torch_dist` checkpoint that loads at any parallel size."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from rsft_lib.artifact import file_hash, new_folder
from rsft_lib.checkpoint import torch_dist
from rsft_lib.model.config import read_config
from rsft_lib.model.weights import hf_shapes, join, weight_map
from rsft_lib.paths import existing, resolve


class HfWeights:
    """The safetensors of a model folder, single file or sharded, read tensor by tensor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of = self._index()
        self.open = {name: _open(folder / name) for name in set(self.file_of.values())}

    def _index(self) -> dict[str, str]:
        index, single = self.folder / "model.safetensors.index.json", self.folder / "model.safetensors"
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not single.is_file():
            raise FileNotFoundError(f"{self.folder} holds neither {single.name} nor {index.name}: download the weights")
        return dict.fromkeys(_open(single).keys(), single.name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).get_slice(name)[:0].dtype

    def read(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)

    def _file(self, name: str):
        return self.open[self.file_of[name]]


def convert(source: str | Path, destination: str | Path) -> dict:
    """Write the weights of a Hugging Face folder as a `torch_dist` checkpoint in their own dtype.

    `config.json` goes along, so the checkpoint describes itself. Memory holds one weight at a time.

    Returns:
        The manifest's facts: source, number of tensors and parameters, dtype.

    Raises:
        FileNotFoundError: no config, no safetensors, or a missing shard.
        ValueError: the tensors are not those that `config.json` describes; every difference is listed.
    """
    source, destination = existing(source, "model folder"), resolve(destination)
    config = read_config(source)
    weights = HfWeights(source)
    _compare(weights, hf_shapes(config), source)
    table = weight_map(config)
    shapes = hf_shapes(config)
    empty = {
        ours: torch.empty(_joined([shapes[name] for name in theirs]), dtype=weights.dtype(theirs[0]), device="meta")
        for ours, theirs in table.items()
    }
    facts = {
        "made_by": "convert",
        "source": str(source),
        "config_sha256": file_hash(source / "config.json"),
        "tensors": len(shapes),
        "parameters": sum(tensor.numel() for tensor in empty.values()),
        "dtype": str(empty["embedding.word_embeddings.weight"].dtype).removeprefix("torch."),
    }
    with new_folder(destination, facts) as folder, tqdm(total=len(table), desc="convert", unit=" tensors") as bar:

        def read(ours: str) -> Tensor:
            bar.update()
            return join([weights.read(name) for name in table[ours]], config)

        torch_dist.write(folder, empty, read)
        shutil.copyfile(source / "config.json", folder / "config.json")
    return facts


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _compare(weights: HfWeights, expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    # Some exporters keep a tied head as a second copy.
    unexpected = weights.file_of.keys() - expected.keys() - {"lm_head.weight"}
    problems = [f"{name}: not described by config.json" for name in sorted(unexpected)]
    for name, shape in expected.items():
        if name not in weights.file_of:
            problems.append(f"{name}: missing")
        elif weights.shape(name) != shape:
            problems.append(f"{name}: shape {weights.shape(name)}, config.json says {shape}")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{folder}: {len(problems)} tensors do not fit config.json:\n  {shown}")


def _open(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is named by the index but missing: download it again")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download it again") from error
