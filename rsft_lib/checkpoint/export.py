"""Export a converted or trained checkpoint of any format and layout as a Hugging Face folder."""

import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.convert import DTYPES, GENERATION, check_dtype, config_bytes, copy_along, origin
from rsft_lib.checkpoint.formats import hf
from rsft_lib.checkpoint.lazy_weights import Weights, resized
from rsft_lib.checkpoint.model_card import data_options, model_card
from rsft_lib.checkpoint.run_checkpoints import is_run, last_checkpoint
from rsft_lib.common.artifact import MANIFEST, file_hash, new_folder, own_manifest, reusable
from rsft_lib.common.paths import require_path, resolve
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
    """Write a checkpoint and a tokenizer as a Hugging Face folder. Does nothing if an identical one exists.

    The vocabulary has the original's size, without padding. Only one block of one weight is in memory at a time; the
    optimizer state is not read.

    Args:
        checkpoint: a folder of any format, or a run folder, whose newest intact checkpoint is taken.
        tokenizer: the folder with tokenizer, chat template and, optionally, `generation_config.json`.
        dtype: 'bfloat16', 'float16' or 'float32'; empty for the dtype in `config.json` for a training checkpoint, and
            for the dtype of each weight otherwise.
        max_shard_size: maximum size of a safetensors file.
        original: Hugging Face folder of the model, for a checkpoint written by Megatron-LM: the source of
            `config.json` and of vocabulary rows that were dropped.
        overwrite: also replace a `destination` that was made from another run or model; a newer checkpoint of the
            same run always replaces an older one.

    Returns:
        The manifest's facts: checkpoint, tokenizer, number of tensors, dtype.

    Raises:
        FileNotFoundError: a folder is missing, the run has no checkpoint, or the checkpoint was not finished.
        FileExistsError: `destination` is something else, or was made from another run or model.
        OSError: the disk has too little space.
        ValueError: the checkpoint is damaged, its tensors do not match its config, a value overflows `dtype`, or the
            tokenizer has more tokens than the model or differs from the one of the training data.
    """
    checkpoint, tokenizer = require_path(checkpoint, "checkpoint"), require_path(tokenizer, "tokenizer folder")
    if is_run(checkpoint):
        checkpoint = last_checkpoint(checkpoint)
    else:
        any_format.check(checkpoint)
    describing, destination = require_path(original, "original") if original else checkpoint, resolve(destination)
    config, manifest = read_config(describing), own_manifest(checkpoint)
    check_dtype(dtype)
    _check_number_of_tokens(tokenizer, config)
    _refuse_another_tokenizer(checkpoint, manifest, tokenizer)
    facts: dict = {
        "made_by": "export",
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": file_hash(checkpoint / MANIFEST) if manifest else "",
        "tokenizer": str(tokenizer),
        "tokenizer_sha256": {name: file_hash(tokenizer / name) for name in _of(tokenizer)},
        "max_shard_size": max_shard_size,
    }
    weights = _weights(checkpoint, config, describing if original else None)
    trained = (config.dtype or torch.float32) if manifest.get("made_by") == "train" else None
    weights = Weights(weights.pieces, DTYPES.get(dtype, trained))
    dtypes = sorted({str(weights.empty(name).dtype).removeprefix("torch.") for name in weights})
    facts |= {"tensors": len(weights.pieces), "dtype": " and ".join(dtypes)}
    same_config = lambda: (destination / "config.json").read_bytes() == config_bytes(describing, dtype)  # noqa: E731
    if facts["checkpoint_sha256"] and reusable(destination, facts, unchanged=same_config):
        return facts
    size = sum(weights.empty(name).nbytes for name in weights)
    listing = facts | origin(checkpoint) | _dialect(manifest)
    with new_folder(destination, listing, size, ["origin", "base"], overwrite) as folder:
        with progress("export", "B", size) as bar:
            listing["files"] = hf.write(folder, weights, max_shard_size, bar.update)
        _describe(folder, describing, dtype, tokenizer)
        listed = {"tensors": facts["tensors"], "dtype": facts["dtype"]}
        (folder / "README.md").write_text(model_card(destination.name, checkpoint, listed), encoding="utf-8")
    return facts


def export_unfinished(checkpoint: Path, tokenizer: Path, folder: Path) -> None:
    """Write the weights of a checkpoint without a manifest to the empty `folder`, for a model that is still trained."""
    config = read_config(checkpoint)
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    weights = Weights(_weights(checkpoint, config, None).pieces, DTYPES[dtype])
    hf.write(folder, weights, "2GB", lambda written: None)
    _describe(folder, checkpoint, dtype, tokenizer)


def _check_number_of_tokens(tokenizer: Path, config: PretrainedConfig) -> None:
    tokens = len(load_tokenizer(tokenizer))
    if tokens > config.vocab_size:
        raise ValueError(
            f"{tokenizer} has {tokens} tokens, but the model's vocab_size is {config.vocab_size}: use the tokenizer "
            "that the model was trained with"
        )


def _refuse_another_tokenizer(checkpoint: Path, manifest: dict, tokenizer: Path) -> None:
    """Refuse a tokenizer or chat template other than the one that the model was trained with."""
    if manifest.get("made_by") != "train":
        return
    trained, given = manifest.get("data", {}), fingerprint(tokenizer)
    differing = [name for name in given if name in trained and trained[name] != given[name]]
    if differing:
        raise ValueError(
            f"{checkpoint} was trained on {manifest['config']['data']}, whose {' and '.join(differing)} differs from "
            f"that of {tokenizer}: export with the tokenizer folder given to notebook 04"
        )


def _weights(checkpoint: Path, config: PretrainedConfig, original: Path | None) -> Weights:
    """The weights to write, by Hugging Face names; check the checkpoint first."""
    weights = any_format.whole_vocabulary(any_format.open_weights(checkpoint, config), config, original)
    return hf.as_hf(resized(weights, any_format.vocabulary(config), config.vocab_size), config)


def _dialect(manifest: dict) -> dict[str, str]:
    """The settings that name the dialect of the training data, so that the model is asked in it."""
    options = data_options(manifest)
    return {name: options[name] for name in ("dialect", "empty_block") if name in options}


def _of(tokenizer: Path) -> list[str]:
    return [name for name in OF_TOKENIZER if (tokenizer / name).is_file()]


def _describe(folder: Path, describing: Path, dtype: str, tokenizer: Path) -> None:
    """Write the files beside the weights: config, tokenizer, chat template, generation config."""
    copy_along(describing, folder, dtype)
    for name in _of(tokenizer):
        shutil.copyfile(tokenizer / name, folder / name)
    if not (folder / GENERATION).is_file():
        loaded = load_tokenizer(tokenizer)
        GenerationConfig(
            bos_token_id=loaded.bos_token_id, eos_token_id=loaded.eos_token_id, pad_token_id=loaded.pad_token_id
        ).save_pretrained(folder)
