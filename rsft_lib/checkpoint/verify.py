"""Verify a conversion: compare every tensor of model and checkpoint bit for bit, and their outputs.

On the command line: `python -m rsft_lib.checkpoint.verify --model HF_FOLDER --checkpoint FOLDER`.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.convert import copy_along, differing
from rsft_lib.checkpoint.export import export
from rsft_lib.checkpoint.formats import hf, torch_dist
from rsft_lib.checkpoint.lazy_weights import Box, Weights, grown, resized, with_row_means
from rsft_lib.checkpoint.proofs import proofs
from rsft_lib.checkpoint.sharded import load_weights
from rsft_lib.common.artifact import VERIFICATION, new_folder, own_manifest, write_json
from rsft_lib.common.device import device
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import build_model
from rsft_lib.model.transformer_config import transformer_config
from rsft_lib.tokenizer.patch import load_tokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog. How many words does this sentence have?"
SHOWN = 5  # number of most likely next tokens in the comparison

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")

Logits = Callable[[Tensor], Tensor]  # ids [1, s] -> logits [1, s, vocabulary]


def verify_conversion(
    model: Path, checkpoint: Path, sentence: str = SENTENCE, new_tokens: int = 16, round_trip: bool = True
) -> dict:
    """Compare a Hugging Face folder with a checkpoint; either may be made from the other. Needs no GPU.

    Args:
        round_trip: also run `lost_in_round_trip`.

    Returns:
        `tensors`: a row for each Hugging Face tensor with its shape, dtype, norm and whether both are bitwise equal;
        `differing_tensors`: names of those that differ; `rounded`: the dtype of the one that has a shorter dtype, to
        which the other was rounded before anything was compared, empty if they have the same; the results of
        `lost_in_round_trip` and `compare_outputs`; and `proofs`, as dicts, from all of these.
    """
    weights, others, rounded = _both(model, checkpoint)
    table = tensor_table(weights, others)
    rows = _rows(model, checkpoint)
    lost = {"lost_in_round_trip": lost_in_round_trip(model, checkpoint.parent, rows)} if round_trip else {}
    report = {
        "model": str(model),
        "checkpoint": str(checkpoint),
        "rounded": str(rounded or "").removeprefix("torch."),
        "differing_tensors": [row["name"] for row in table if not row["same"]],
        **lost,
        **compare_outputs(model, checkpoint, sentence, new_tokens, rounded),
        "tensors": table,
    }
    return {"proofs": [proof._asdict() for proof in proofs(report)], **report}


def tensor_table(weights: Weights, others: Weights) -> list[dict]:
    """Every tensor: name, shape, dtype, L2 norm, and whether it is bitwise equal in both."""
    different = set(differing(weights, others))
    return [
        {
            "name": name,
            "shape": list(weights.empty(name).shape),
            "dtype": str(weights.empty(name).dtype).removeprefix("torch."),
            "norm": sum(float(block.double().square().sum()) for block in weights.blocks(name)) ** 0.5,
            "same": name not in different,
        }
        for name in weights
    ]


def _both(model: Path, checkpoint: Path) -> tuple[Weights, Weights, torch.dtype | None]:
    """Both by Hugging Face names, and the shorter of two dtypes, to which both are then rounded; None if equal."""
    config = read_config(model)
    weights = hf.open_weights(model, config)
    config.vocab_size = _rows(model, checkpoint)
    vocabulary = [name for name in EMBEDDINGS if name in weights.pieces]
    weights = with_row_means(grown(weights, vocabulary, config.vocab_size), vocabulary, _row_means(checkpoint))
    any_format.check(checkpoint)
    stored = any_format.open_weights(checkpoint, config)
    others = hf.as_hf(resized(stored, any_format.vocabulary(config), config.vocab_size), config)
    dtypes = [{w.empty(name).dtype for name in w} for w in (weights, others)]
    if dtypes[0] != dtypes[1] and [len(kinds) for kinds in dtypes] == [1, 1]:
        shorter = min(dtypes[1].pop(), dtypes[0].pop(), key=lambda dtype: dtype.itemsize)
        return Weights(weights.pieces, shorter), Weights(others.pieces, shorter), shorter
    return weights, others, None


def _rows(model: Path, checkpoint: Path) -> int:
    """Rows of the embedding: `convert` may have added some to the model's."""
    described = [folder for folder in (model, checkpoint) if (folder / "config.json").is_file()]
    return max(read_config(folder).vocab_size for folder in described)


def _row_means(checkpoint: Path) -> dict[int, list[int]]:
    """The rows that `convert` replaced by a mean of others."""
    return {int(row): others for row, others in own_manifest(checkpoint).get("row_means", {}).items()}


class _Perturbed(Weights):
    """Weights with the lowest bit of every value flipped, so that only converted values can match."""

    def read(self, name: str, box: Box = ()) -> Tensor:
        tensor = super().read(name, box)
        bits = torch.int16 if tensor.itemsize == 2 else torch.int32
        return (tensor.contiguous().view(bits) ^ 1).view(tensor.dtype)


def lost_in_round_trip(model: Path, scratch: Path, rows: int = 0) -> list[str]:
    """Names of tensors that change when the perturbed model is written to a checkpoint and exported again.

    Temporarily needs twice the model's size on the disk of `scratch`.

    Args:
        rows: rows to which the embedding has grown; 0 for the model's.
    """
    config = read_config(model)
    weights = hf.open_weights(model, config)
    config.vocab_size = max(config.vocab_size, rows)
    vocabulary = [name for name in EMBEDDINGS if name in weights.pieces]
    perturbed = _Perturbed(grown(weights, vocabulary, config.vocab_size).pieces)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".round-trip-") as place:
        facts: dict = {"made_by": "convert"}
        with new_folder(Path(place) / "checkpoint", facts) as folder:
            facts["files"] = torch_dist.write(folder, _Perturbed(hf.as_megatron(perturbed, config).pieces))
            copy_along(model, folder, vocab_size=config.vocab_size)
        export(Path(place) / "checkpoint", model, Path(place) / "exported")
        return differing(perturbed, hf.open_weights(Path(place) / "exported", config))


def compare_outputs(
    model: Path, checkpoint: Path, sentence: str, new_tokens: int, rounded: torch.dtype | None = None
) -> dict:
    """Run one sentence through transformers (folder) and megatron-core (checkpoint), both in fp32.

    Args:
        rounded: a dtype to which the weights of both are rounded first.

    Returns:
        `logit_difference`: maximum absolute difference over all positions; `next_tokens`: the most likely ones with
        both logits; `tokens` and `text`: the greedy continuation of each, by library.
    """
    tokenizer = load_tokenizer(model)
    ids = torch.tensor([tokenizer(sentence)["input_ids"]], device=device())

    def generate(logits: Logits) -> tuple[Tensor, list[int]]:
        return logits(ids), _greedy(logits, ids, new_tokens)

    means, rows = _row_means(checkpoint), _rows(model, checkpoint)
    expected, expected_tokens = with_transformers(model, generate, means, rows, rounded)
    actual, actual_tokens = with_megatron(model, checkpoint, ids.shape[1] + new_tokens, generate, rounded)
    likely = expected[0, -1].topk(SHOWN).indices.tolist()
    return {
        "sentence": sentence,
        "logit_difference": (actual - expected).abs().max().item(),
        "next_tokens": [
            {
                "token": tokenizer.decode([t]),
                "transformers": expected[0, -1, t].item(),
                "megatron": actual[0, -1, t].item(),
            }
            for t in likely
        ],
        "tokens": {"transformers": expected_tokens, "megatron": actual_tokens},
        "text": {"transformers": tokenizer.decode(expected_tokens), "megatron": tokenizer.decode(actual_tokens)},
    }


@torch.no_grad()
def with_transformers(
    model: Path,
    use: Callable[[Logits], object],
    row_means: dict[int, list[int]] | None = None,
    rows: int = 0,
    rounded: torch.dtype | None = None,
):
    """The result of `use` on a folder's model, loaded by transformers in fp32 and released afterwards.

    `rows` is the number of embedding rows to grow to, each new one the mean of the others; 0 for the model's.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
    loaded = loaded.to(device()).eval()
    stored = read_config(model).dtype or torch.float32
    before = loaded.config.vocab_size
    if rows > before:
        loaded.resize_token_embeddings(rows, mean_resizing=False)
        for table in {loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight}:
            table[before:] = table[:before].mean(dim=0).to(stored).float()
    for table in {loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight}:
        means = {row: table[others].mean(dim=0).to(stored).float() for row, others in (row_means or {}).items()}
        for row, mean in means.items():
            table[row] = mean
    _round(loaded, rounded)
    return use(lambda ids: loaded(ids, use_cache=False).logits)


@torch.no_grad()
def with_megatron(
    model: Path,
    checkpoint: Path,
    max_length: int,
    use: Callable[[Logits], object],
    rounded: torch.dtype | None = None,
):
    """The result of `use` on a checkpoint, loaded by megatron-core in fp32 on one rank; `model` has its config."""
    config = read_config(model)
    config.vocab_size = _rows(model, checkpoint)
    with ranks():
        loaded = build_model(config, transformer_config(config), "torch", max_length).to(device()).eval()
        load_weights(loaded, checkpoint)
        _round(loaded, rounded)
        return use(lambda ids: loaded(ids, torch.arange(ids.shape[1], device=ids.device)[None], None))


def _round(model: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Give every weight the precision of `dtype`, but keep it in fp32."""
    for parameter in model.parameters() if dtype else ():
        parameter.copy_(parameter.to(dtype))


def _greedy(logits: Logits, ids: Tensor, new_tokens: int) -> list[int]:
    """The greedy continuation."""
    start = ids.shape[1]
    for _ in range(new_tokens):
        ids = torch.cat([ids, logits(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[0, start:].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with its tokenizer")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint to compare it with")
    parser.add_argument("--output", type=Path, help=f"JSON file; default: {VERIFICATION} in the checkpoint")
    parser.add_argument("--sentence", default=SENTENCE, help="prompt that both continue")
    parser.add_argument("--no-round-trip", action="store_true", help="skip the round trip with changed bits")
    arguments = parser.parse_args()
    round_trip = not arguments.no_round_trip
    result = verify_conversion(arguments.model, arguments.checkpoint, arguments.sentence, round_trip=round_trip)
    write_json(arguments.output or arguments.checkpoint / VERIFICATION, result)


if __name__ == "__main__":
    main()
