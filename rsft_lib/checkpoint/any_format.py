"""Verify and open weights in any format: Hugging Face, `torch_dist` or Megatron-LM, by their megatron-core names."""

import hashlib
import json
from pathlib import Path

from transformers import PretrainedConfig

from rsft_lib.checkpoint.formats import hf, legacy, torch_dist
from rsft_lib.checkpoint.lazy_weights import Piece, Weights, refuse
from rsft_lib.common.artifact import MANIFEST, file_hash, read_manifest, verify, verify_files
from rsft_lib.model.weight_map import EMBEDDING, HEAD, megatron_shapes, weight_map

OF_A_MODEL = ("embedding.", "decoder.", "output_layer.")  # all other names belong to the optimizer


def kind(folder: Path) -> str:
    """The format of a folder: 'torch_dist', 'legacy' (Megatron-LM's older layout, one file per rank) or 'hf'.

    Raises:
        FileNotFoundError: the folder has none of these formats.
    """
    if (Path(folder) / torch_dist.METADATA).is_file():
        return "torch_dist"
    if legacy.iteration_folder(folder):
        return "legacy"
    hf.weight_files(folder)
    return "hf"


def check(folder: Path) -> None:
    """Check the hash of every file with weights, and that none of its pickles can run code.

    Folders that this kit did not write have no hashes; a `torch_dist` checkpoint without hashes is refused.

    Raises:
        FileNotFoundError: the checkpoint or a file is missing, or its save was not finished.
        ValueError: a file is damaged, belongs to another checkpoint or is unsafe; the message names it.
    """
    folder, format = Path(folder), kind(folder)
    if format == "torch_dist":
        torch_dist.check(folder, _of_a_model)
    elif format == "hf" and (folder / MANIFEST).is_file():
        verify_files(folder, hf.weight_files(folder))
    elif format == "legacy":
        for root in (folder, folder.parent):  # the manifest is beside the tracker
            if (root / MANIFEST).is_file():
                verify(root)


def identity(folder: Path) -> str:
    """SHA-256 over `config.json` and the weight files of a folder, independent of its path.

    Hashes listed in the folder's manifest are not recomputed.
    """
    folder, format = Path(folder), kind(folder)
    if format == "hf":
        files = [folder / name for name in hf.weight_files(folder)]
    else:
        files = sorted(folder.rglob(f"*{torch_dist.SUFFIX}" if format == "torch_dist" else legacy.FILE))
    names = ["config.json", *(path.relative_to(folder).as_posix() for path in files)]
    listed = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
    hashes = {name: listed[name]["sha256"] if name in listed else file_hash(folder / name) for name in names}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def open_weights(folder: Path, config: PretrainedConfig) -> Weights:
    """The weights of a folder, memory-mapped; `check` it first. The optimizer state is not read.

    Their number of vocabulary rows may differ from `config`: Megatron-LM pads or truncates them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights do not match `config`; every difference is listed.
    """
    if kind(folder) == "hf":
        return hf.as_megatron(hf.open_weights(folder, config), config)
    if kind(folder) == "legacy":
        weights = legacy.open_weights(folder, config)
    else:
        weights = torch_dist.open_weights(folder, _of_a_model)
    _compare(weights, config, Path(folder))
    return weights


def vocabulary(config: PretrainedConfig) -> list[str]:
    """Names of the weights with one row per token."""
    return [name for name in (EMBEDDING, HEAD) if name in weight_map(config)]


def whole_vocabulary(weights: Weights, config: PretrainedConfig, original: Path | None = None) -> Weights:
    """The weights with at least a row for each of `config.vocab_size` tokens.

    Megatron-LM sizes the embedding by the tokenizer and drops the rows beyond it; they are read from the Hugging Face
    folder `original`.

    Raises:
        ValueError: rows are missing and `original` is None.
    """
    short = [name for name in vocabulary(config) if len(weights.empty(name)) < config.vocab_size]
    if not short:
        return weights
    stored = len(weights.empty(short[0]))
    if original is None:
        raise ValueError(
            f"the checkpoint has {stored} vocabulary rows, but vocab_size in config.json is {config.vocab_size}: "
            "set `original` to the folder of the model that it was converted from, to read the missing rows"
        )
    donor, changed = open_weights(original, config), {}
    for name in short:
        rest = donor.read(name, (slice(stored, None), slice(None))).to(weights.empty(name).dtype)
        changed[name] = weights.pieces[name] + [Piece((stored, 0), rest)]
    return Weights(weights.pieces | changed, weights.dtype)


def _of_a_model(name: str) -> bool:
    return name.startswith(OF_A_MODEL)


def _compare(weights: Weights, config: PretrainedConfig, folder: Path) -> None:
    expected, of_tokens = megatron_shapes(config), vocabulary(config)
    problems = [f"{name}: not described by config.json" for name in sorted(weights.pieces.keys() - expected.keys())]
    for name, shape in expected.items():
        if name not in weights.pieces:
            problems.append(f"{name}: missing")
            continue
        stored = tuple(weights.empty(name).shape)
        if stored[1:] != shape[1:] or (stored != shape and name not in of_tokens):
            problems.append(f"{name}: shape {stored}, expected {shape} from config.json")
    refuse(problems, f"weights of {folder} do not match config.json")
