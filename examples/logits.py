"""The next tokens that a Megatron checkpoint expects: python examples/logits.py MODEL CHECKPOINT TEXT

MODEL is the Hugging Face folder that CHECKPOINT was converted from, with its tokenizer.
"""

import sys
from pathlib import Path

import torch

from rsft_lib import load_tokenizer
from rsft_lib.checkpoint.verify import with_megatron

if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    model, checkpoint, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    tokenizer = load_tokenizer(model)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    logits = with_megatron(model, checkpoint, ids.shape[1], lambda logits: logits(ids))  # [1, s, vocabulary]
    for value, token in zip(*logits[0, -1].topk(5), strict=True):
        print(f"{value.item():9.4f}  {tokenizer.decode([token.item()])!r}")
