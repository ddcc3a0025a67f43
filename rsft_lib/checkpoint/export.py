"""Out of Megatron: a checkpoint of any format and layout, converted or trained, becomes a Hugging Face folder."""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.convert import DTYPES, GENERATION, config_bytes, origin
from rsft_lib.checkpoint.formats import hf
from rsft_lib.checkpoint.lazy_weights import Weights, resized
from rsft_lib.checkpoint.model_card import model_card
from rsft_lib.common.artifact import MANIFEST, file_hash, new_folder, read_manifest, verify
from rsft_lib.common.paths import existing, resolve
from rsft_lib.common.progress import progress
from rsft_lib.model.config import read_config
from rsft_lib.tokenizer.patch import fingerprint, load_tokenizer

OF_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def export(
    checkpoint: str | Path,
    tokenizer: str | Path,
    destination: str | Path,
    *,
    dtype: str = "",
    max_shard_size: str = "2GB",
    original: str | Path = "",
    overwrite: bool = False,
) -> dict:
    """Write a checkpoint and a tokenizer as a Hugging Face folder. Nothing is done where it is there already.

    The vocabulary has the original's size, padding removed. Memory holds one block of one weight at a time; the
    optimizer's state is not read.

    Args:
        checkpoint: a folder of any format; of a run, one of its `iter_0000000`.
        tokenizer: the folder with tokenizer, chat template and, if it has one, `generation_config.json`.
        dtype: 'bfloat16', 'float16' or 'float32'; empty for that of `config.json` after a training, and otherwise
            for that of each weight.
        max_shard_size: largest safetensors file.
        original: Hugging Face folder of the model, for a checkpoint that Megatron-LM wrote: `config.json`, and rows of
            the vocabulary that were cut off, come from it.
        overwrite: replace `destination` where it was made from another run or model, too; a newer checkpoint of the
            same run replaces an older one in any case.

    Returns:
        The manifest's facts: checkpoint, tokenizer, number of tensors, dtype.

    Raises:
        FileNotFoundError: a folder is missing, or the checkpoint was not finished.
        FileExistsError: `destination` is something else, or was made from another run or model.
        OSError: the disk has not enough space.
        ValueError: the checkpoint is damaged, its tensors are not those that its config describes, a value
            overflows `dtype`, or the tokenizer has more tokens than the model, or is not the one that a run's data was
            tokenized with.
    """
    checkpoint, tokenizer = existing(checkpoint, "checkpoint"), existing(tokenizer, "tokenizer folder")
    describing, destination = existing(original, "original") if original else checkpoint, resolve(destination)
    config = read_config(describing)
    _check_settings(dtype, tokenizer, config)
    _refuse_another_tokenizer(checkpoint, tokenizer)
    facts = {
        "made_by": "export",
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": _identity(checkpoint),
        "tokenizer": str(tokenizer),
        "tokenizer_sha256": {name: file_hash(tokenizer / name) for name in _of(tokenizer)},
        "max_shard_size": max_shard_size,
    }
    weights = _weights(checkpoint, config, dtype, describing if original else None)
    dtypes = sorted({str(weights.empty(name).dtype).removeprefix("torch.") for name in weights})
    facts |= {"tensors": len(weights.pieces), "dtype": " and ".join(dtypes)}
    if _already_there(destination, facts, config_bytes(describing, dtype)):
        print(f"{destination} is there already, whole and of the same checkpoint")
        return facts
    size = sum(weights.empty(name).nbytes for name in weights)
    listing = facts | origin(checkpoint)
    with new_folder(destination, listing, size, ["origin", "base"], overwrite) as folder:
        with progress("export", "B", size) as bar:
            listing["files"] = hf.write(folder, weights, max_shard_size, bar.update)
        _describe(folder, describing, dtype, tokenizer)
        told = {"tensors": facts["tensors"], "dtype": facts["dtype"]}
        (folder / "README.md").write_text(model_card(destination.name, checkpoint, told), encoding="utf-8")
    return facts


def _check_settings(dtype: str, tokenizer: Path, config: PretrainedConfig) -> None:
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}, or '' to keep it")
    tokens = len(load_tokenizer(tokenizer))
    if tokens > config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {tokens} tokens, the model only {config.vocab_size}: they do not belong together"
        )


def _refuse_another_tokenizer(checkpoint: Path, tokenizer: Path) -> None:
    """The model would be asked in other tokens, or by another template, than it was trained on."""
    if not (checkpoint / MANIFEST).is_file():
        return
    manifest = read_manifest(checkpoint)
    trained, given = manifest.get("data", {}), fingerprint(tokenizer)
    differing = [name for name in given if name in trained and trained[name] != given[name]]
    if manifest["made_by"] == "train" and differing:
        raise ValueError(
            f"{checkpoint} was trained on {manifest['config']['data']}, which was tokenized with another "
            f"{' and '.join(differing)} than {tokenizer} has: export with the folder given to notebook 04"
        )


def _weights(checkpoint: Path, config: PretrainedConfig, dtype: str, original: Path | None) -> Weights:
    """What will be written, by Hugging Face names."""
    any_format.check(checkpoint)
    weights = any_format.whole_vocabulary(any_format.open_weights(checkpoint, config), config, original)
    weights = hf.as_hf(resized(weights, any_format.vocabulary(config), config.vocab_size), config)
    trained = (checkpoint / MANIFEST).is_file() and read_manifest(checkpoint)["made_by"] == "train"
    return Weights(weights.pieces, DTYPES[dtype] if dtype else (config.dtype or torch.float32) if trained else None)


def _identity(checkpoint: Path) -> str:
    """The hash of a checkpoint's list of hashes; '' for one that this kit did not write."""
    return file_hash(checkpoint / MANIFEST) if (checkpoint / MANIFEST).is_file() else ""


def _already_there(destination: Path, facts: dict, config: bytes) -> bool:
    if not facts["checkpoint_sha256"] or not (destination / MANIFEST).is_file():
        return False
    try:
        before = verify(destination)
    except (OSError, ValueError) as error:
        print(f"exporting again: {error}")
        return False
    same = all(before.get(name) == fact for name, fact in facts.items())
    return same and (destination / "config.json").read_bytes() == config


def _of(tokenizer: Path) -> list[str]:
    return [name for name in OF_TOKENIZER if (tokenizer / name).is_file()]


def _describe(folder: Path, describing: Path, dtype: str, tokenizer: Path) -> None:
    """Write what goes with the weights: config, tokenizer, template, how to generate."""
    (folder / "config.json").write_bytes(config_bytes(describing, dtype))
    for name in _of(tokenizer):
        shutil.copyfile(tokenizer / name, folder / name)
    if (folder / GENERATION).is_file():
        return
    if (describing / GENERATION).is_file():
        shutil.copyfile(describing / GENERATION, folder / GENERATION)
    else:
        ends = load_tokenizer(tokenizer)
        GenerationConfig(
            bos_token_id=ends.bos_token_id, eos_token_id=ends.eos_token_id, pad_token_id=ends.pad_token_id
        ).save_pretrained(folder)
