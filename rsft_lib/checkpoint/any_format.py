"""Any folder with a model's weights, checked and read by megatron-core's names, whatever its format and layout."""

import hashlib
import json
from pathlib import Path

from transformers import PretrainedConfig

from rsft_lib.checkpoint.formats import hf, legacy, torch_dist
from rsft_lib.checkpoint.lazy_weights import Piece, Weights, refuse
from rsft_lib.common.artifact import MANIFEST, file_hash, read_manifest, verify, verify_files
from rsft_lib.model.weight_map import EMBEDDING, HEAD, megatron_shapes, weight_map

OF_A_MODEL = ("embedding.", "decoder.", "output_layer.")  # other names in a checkpoint are the optimizer's


def kind(folder: Path) -> str:
    """'torch_dist', 'legacy' (files of ranks, as Megatron-LM's older layout has them) or 'hf'.

    Raises:
        FileNotFoundError: the folder is none of these.
    """
    if (Path(folder) / torch_dist.METADATA).is_file():
        return "torch_dist"
    if legacy.iteration_folder(folder):
        return "legacy"
    hf.weight_files(folder)
    return "hf"


def check(folder: Path) -> None:
    """Check the hash of every file of which a weight will be used, and that no pickle among them can run anything.

    Folders that this kit did not write have no hashes; a `torch_dist` checkpoint without them is refused.

    Raises:
        FileNotFoundError: there is no checkpoint, it was not finished, or a file is missing.
        ValueError: a file is damaged, not of this checkpoint, or not to be trusted; the message names it.
    """
    folder, found = Path(folder), kind(folder)
    if found == "torch_dist":
        torch_dist.check(folder, _of_a_model)
    elif found == "hf" and (folder / MANIFEST).is_file():
        verify_files(folder, hf.weight_files(folder))
    elif found == "legacy":
        for root in (folder, folder.parent):  # the manifest lies beside the tracker
            if (root / MANIFEST).is_file():
                verify(root)


def identity(folder: Path) -> str:
    """SHA-256 over `config.json` and the weight files of a folder, independent of its path.

    Hashes are taken from the folder's manifest where it lists them.
    """
    folder, found = Path(folder), kind(folder)
    if found == "hf":
        files = [folder / name for name in hf.weight_files(folder)]
    else:
        files = sorted(folder.rglob(f"*{torch_dist.SUFFIX}" if found == "torch_dist" else legacy.FILE))
    names = ["config.json", *(path.relative_to(folder).as_posix() for path in files)]
    listed = read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
    hashes = {name: listed[name]["sha256"] if name in listed else file_hash(folder / name) for name in names}
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def open_weights(folder: Path, config: PretrainedConfig) -> Weights:
    """The weights of a folder, memory-mapped; `check` it first. The optimizer's state is not read.

    Their vocabulary may have another number of rows than `config` says: padding, or what Megatron-LM cut off.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the weights are not those of `config`; every difference is listed.
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
    """Names of the weights with a row for each token."""
    return [name for name in (EMBEDDING, HEAD) if name in weight_map(config)]


def whole_vocabulary(weights: Weights, config: PretrainedConfig, original: Path | None = None) -> Weights:
    """The weights with at least a row for each of `config.vocab_size` tokens.

    Megatron-LM sizes the embedding by the tokenizer, and so cuts off rows that no token has; they are taken from the
    Hugging Face folder `original`.

    Raises:
        ValueError: rows are missing, and no `original` was given.
    """
    short = [name for name in vocabulary(config) if len(weights.empty(name)) < config.vocab_size]
    if not short:
        return weights
    stored = len(weights.empty(short[0]))
    if original is None:
        raise ValueError(
            f"the checkpoint has rows for {stored} tokens, config.json says {config.vocab_size}: "
            "name the model it was made from as `original`, from which the others are taken"
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
        found = tuple(weights.empty(name).shape)
        if found[1:] != shape[1:] or (found != shape and name not in of_tokens):
            problems.append(f"{name}: shape {found}, config.json says {shape}")
    refuse(problems, f"weights of {folder} do not fit config.json")
