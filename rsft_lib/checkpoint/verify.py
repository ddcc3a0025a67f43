"""Proof that a checkpoint is the model it was made from: every tensor bit for bit, and the logits side by side."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rsft_lib.artifact import write_json
from rsft_lib.checkpoint import torch_dist
from rsft_lib.checkpoint.convert import HfWeights
from rsft_lib.checkpoint.sharded import load_weights
from rsft_lib.host import device
from rsft_lib.model.config import read_config, transformer_config
from rsft_lib.model.gpt import build_model
from rsft_lib.model.weights import to_hf
from rsft_lib.ranks import ranks


def differing_tensors(model: Path, checkpoint: Path) -> list[str]:
    """Names of the Hugging Face tensors that the checkpoint does not give back bit for bit."""
    stored, weights = torch_dist.tensors(checkpoint), HfWeights(model)
    returned = to_hf(lambda name: torch_dist.read(checkpoint, stored[name], name), read_config(checkpoint))
    return [name for name, tensor in returned if not torch.equal(tensor, weights.read(name))]


@torch.no_grad()
def logit_difference(model: Path, checkpoint: Path, tokens: int = 64) -> float:
    """Largest absolute difference of the logits of transformers and megatron-core, in fp32, on random tokens."""
    config = read_config(checkpoint)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device())
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device())(ids).logits
    with ranks():
        ours = build_model(config, transformer_config(config), "torch", tokens).to(device())
        load_weights(ours, checkpoint)
        found = ours(ids, torch.arange(tokens, device=ids.device)[None], None)
    return (found - expected).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--checkpoint", type=Path, required=True, help="converted checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    arguments = parser.parse_args()
    result = {
        "differing_tensors": differing_tensors(arguments.model, arguments.checkpoint),
        "logit_difference": logit_difference(arguments.model, arguments.checkpoint),
    }
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
