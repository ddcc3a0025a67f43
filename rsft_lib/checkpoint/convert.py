"""Convert a model folder or a checkpoint into a megatron-core checkpoint."""

import json
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.formats import hf, legacy, torch_dist
from rsft_lib.checkpoint.lazy_weights import Weights, grown, resized, with_row_means
from rsft_lib.common.artifact import file_hash, new_folder, own_manifest, reusable
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.common.progress import progress
from rsft_lib.model.config import check_layout, read_config

FORMATS = ("torch_dist", "legacy")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GENERATION = "generation_config.json"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "torch_dist",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    vocab_size: int = 0,
    dtype: str = "",
    tokens: int = 0,
    row_means: dict[int, list[int]] | None = None,
    original: str | Path = "",
    overwrite: bool = False,
) -> dict:
    """Convert the weights of a folder to a megatron-core checkpoint. Does nothing if an identical one exists.

    Only one block of one weight is in memory at a time; weights are copied bit for bit unless `dtype` is set.

    Args:
        source: a Hugging Face folder (safetensors, or `.bin` files with tensors only), or a checkpoint of either
            format, including a training checkpoint; its optimizer state is not read.
        format: 'torch_dist', which loads at any parallel size, or 'legacy', Megatron-LM's older layout with one file
            per rank, written to `destination` with `_TP1PP1` appended.
        tensor_parallel, pipeline_parallel: parallel sizes of the legacy layout.
        vocab_size: vocabulary size that Megatron-LM will use for the legacy layout (its tokenizer's, 151,665 for
            R1-Distill-Qwen); 0 for that of `config.json`. It is padded; the model's rows beyond that are dropped.
        dtype: 'bfloat16', 'float16' or 'float32' to cast all weights; empty to keep the dtype of each weight.
        tokens: number of tokens of the tokenizer. If the model has fewer rows, embedding, output layer and `vocab_size`
            in `config.json` grow to it; each new row is the mean of all rows.
        row_means: token -> tokens; initialise its rows in embedding and output layer as the mean of theirs.
        original: Hugging Face folder of the model, for a checkpoint written by Megatron-LM: the source of
            `config.json` and of vocabulary rows that were dropped.
        overwrite: also replace a `destination` that was made from another model or run.

    Returns:
        The manifest's facts: source, folder, number of weights and parameters, dtype.

    Raises:
        FileNotFoundError: config, weights or a shard are missing.
        FileExistsError: `destination` is something else, or was made from another model or run.
        OSError: the disk has too little space.
        ValueError: the weights do not match `config.json`, a setting does not fit the model, or a value overflows
            `dtype`.
    """
    source, destination = require_path(source, "model folder"), resolve(destination)
    describing = require_path(original, "original model") if original else source
    config, row_means = read_config(describing), row_means or {}
    total = max(config.vocab_size, tokens)
    _check_settings(config, format, tensor_parallel, pipeline_parallel, vocab_size, dtype, row_means, total)
    any_format.check(source)
    _report_ignored_files(source)
    weights = any_format.whole_vocabulary(
        any_format.open_weights(source, config), config, describing if original else None
    )
    vocabulary, rows = any_format.vocabulary(config), total
    weights = grown(weights, vocabulary, total)
    config.vocab_size = total
    if format == "legacy":
        rows = legacy.rows_of_vocabulary(vocab_size or rows, tensor_parallel)
        destination = destination.with_name(f"{destination.name}_TP{tensor_parallel}PP{pipeline_parallel}")
    weights = resized(with_row_means(weights, vocabulary, row_means), vocabulary, rows)
    weights = Weights(weights.pieces, DTYPES.get(dtype))
    facts = {
        "made_by": "convert",
        "format": format,
        "tensor_parallel": tensor_parallel,
        "pipeline_parallel": pipeline_parallel,
        "vocabulary_rows": rows,
        "row_means": {str(row): list(others) for row, others in row_means.items()},
        "config_sha256": file_hash(describing / "config.json"),
        **_counts(weights),
    }

    def unchanged() -> bool:  # bit for bit what would be written
        if (destination / "config.json").read_bytes() != config_bytes(describing, dtype, total):
            return False
        return not differing(weights, any_format.open_weights(destination, config))

    if not reusable(destination, facts, nested=True, unchanged=unchanged):
        facts_and_source = {**facts, "source": str(source), **origin(source)}
        _write(destination, facts_and_source, weights, config, describing, dtype, overwrite)
    return {**facts, "source": str(source), "folder": str(destination)}


def _report_ignored_files(source: Path) -> None:
    if any_format.kind(source) == "hf" and (others := hf.weight_sources(source)[1:]):
        first = hf.weight_sources(source)[0]
        print(f"{source}: reading {first}, ignoring {', '.join(others)} (the precedence of transformers)")


def _check_settings(
    config: PretrainedConfig, format: str, tensor_parallel: int, pipeline_parallel: int, vocab_size: int, dtype: str,
    row_means: dict[int, list[int]], rows: int,
) -> None:  # fmt: skip
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    check_dtype(dtype)
    if min(tensor_parallel, pipeline_parallel) < 1:
        raise ValueError(f"{tensor_parallel=} and {pipeline_parallel=} must be at least 1")
    if format == "legacy":
        legacy.refuse_experts(config)
        check_layout(config, tensor_parallel, pipeline_parallel)
    elif (tensor_parallel, pipeline_parallel, vocab_size) != (1, 1, 0):
        raise ValueError(
            "parallel sizes and vocab_size are for format 'legacy'; a torch_dist checkpoint loads at any size"
        )
    for row, others in row_means.items():
        invalid = [token for token in (row, *others) if not 0 <= token < rows]
        if invalid or not others:
            raise ValueError(f"row_means[{row}] = {others}: expected token ids from 0 to {rows - 1}")


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for a dtype that is neither one of DTYPES nor empty."""
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}, or '' to keep the dtype")


def _counts(weights: Weights) -> dict:
    empty = [weights.empty(name) for name in weights]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in empty})
    return {"weights": len(empty), "parameters": sum(t.numel() for t in empty), "dtype": " and ".join(dtypes)}


def differing(weights: Weights, others: Weights) -> list[str]:
    """Names of the weights that are not bitwise identical in both, including dtype."""
    return [name for name in {**weights.pieces, **others.pieces} if not _same(weights, others, name)]


def _same(weights: Weights, others: Weights, name: str) -> bool:
    if name not in weights.pieces or name not in others.pieces:
        return False
    a, b = weights.empty(name), others.empty(name)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    pairs = ((weights.read(name, box), others.read(name, box)) for box in weights.cuts(name))
    return all(torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in pair)) for pair in pairs)


def origin(folder: Path) -> dict[str, str]:
    """Where a folder comes from: a training checkpoint's run (at any step) and base model; otherwise itself."""
    manifest = own_manifest(folder)
    if manifest.get("made_by") == "train":
        return {"origin": str(folder.parent), "base": manifest.get("config", {}).get("checkpoint", "")}
    return {"origin": str(folder), "base": ""}


def _write(
    destination: Path,
    facts: dict,
    weights: Weights,
    config: PretrainedConfig,
    describing: Path,
    dtype: str,
    overwrite: bool,
) -> None:
    layout = facts["tensor_parallel"], facts["pipeline_parallel"]
    files = legacy.plan(weights, config, *layout) if facts["format"] == "legacy" else []
    size = legacy.nbytes(weights, files) if files else sum(weights.empty(name).nbytes for name in weights)
    with (
        new_folder(destination, facts, size, ["origin", "base"], overwrite) as folder,
        progress("convert", "B", size) as bar,
    ):
        if files:
            legacy.write(folder, weights, files, bar.update)
        else:
            facts["files"] = torch_dist.write(folder, weights, bar.update)
        copy_along(describing, folder, dtype, config.vocab_size)


def copy_along(describing: Path, folder: Path, dtype: str = "", vocab_size: int = 0) -> None:
    """Copy `config.json` and the generation config; see `config_bytes`."""
    if (describing / GENERATION).is_file():
        shutil.copyfile(describing / GENERATION, folder / GENERATION)
    (folder / "config.json").write_bytes(config_bytes(describing, dtype, vocab_size))


def config_bytes(describing: Path, dtype: str = "", vocab_size: int = 0) -> bytes:
    """The `config.json` of a model whose weights were cast to `dtype` or grown to `vocab_size` rows.

    It is unchanged if neither is given or new. The field is `dtype` in transformers 5 and `torch_dtype` before; each
    one that is present is set.
    """
    file = (describing / "config.json").read_bytes()
    content = json.loads(file)
    names = [name for name in ("dtype", "torch_dtype") if name in content] or ["dtype"]
    changes: dict = dict.fromkeys(names, dtype) if dtype else {}
    if vocab_size and vocab_size != content.get("vocab_size"):
        changes["vocab_size"] = vocab_size
    return (json.dumps(content | changes, indent=2, ensure_ascii=False) + "\n").encode() if changes else file
