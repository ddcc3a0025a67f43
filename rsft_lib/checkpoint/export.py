"""Megatron -> Hugging Face: a `torch_dist` checkpoint, converted or trained, becomes a model folder."""

import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from tqdm import tqdm

from rsft_lib.artifact import new_folder, verify
from rsft_lib.checkpoint import torch_dist
from rsft_lib.model.config import read_config
from rsft_lib.model.weights import hf_shapes, to_hf, weight_map
from rsft_lib.paths import existing, resolve

NOT_FROM_TOKENIZER = {"config.json", "manifest.json"}


def export(checkpoint: str | Path, tokenizer: str | Path, destination: str | Path) -> dict:
    """Write the weights of a checkpoint, its `config.json` and the tokenizer as a Hugging Face model folder.

    Weights are stored in the dtype that `config.json` names; the optimizer's state is not read.

    Returns:
        The manifest's facts: checkpoint, tokenizer, number of tensors, dtype.

    Raises:
        FileNotFoundError: a folder is missing, or the checkpoint was not finished.
        ValueError: the checkpoint is damaged, or its tensors are not those that its config describes.
    """
    checkpoint, tokenizer = existing(checkpoint, "checkpoint"), existing(tokenizer, "tokenizer folder")
    verify(checkpoint)
    config = read_config(checkpoint)
    stored = torch_dist.tensors(checkpoint)
    missing = weight_map(config).keys() - stored.keys()
    if missing:
        raise ValueError(f"{checkpoint} lacks {len(missing)} weights of its config.json, e.g. {sorted(missing)[0]}")
    dtype = config.dtype or torch.float32

    def read(ours: str) -> Tensor:
        return torch_dist.read(checkpoint, stored[ours], ours).to(dtype)

    progress = tqdm(to_hf(read, config), total=len(hf_shapes(config)), desc="export", unit=" tensors")
    weights = {name: tensor.clone() for name, tensor in progress}  # safetensors refuses views of one storage
    facts = {
        "made_by": "export",
        "checkpoint": str(checkpoint),
        "tokenizer": str(tokenizer),
        "tensors": len(weights),
        "dtype": str(dtype).removeprefix("torch."),
    }
    with new_folder(resolve(destination), facts) as folder:
        save_torch_state_dict(weights, folder)
        shutil.copyfile(checkpoint / "config.json", folder / "config.json")
        for path in tokenizer.iterdir():
            if path.is_file() and path.name not in NOT_FROM_TOKENIZER and path.suffix != ".safetensors":
                shutil.copyfile(path, folder / path.name)
    return facts
