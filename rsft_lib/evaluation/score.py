"""Per-token loss of a tokenized dataset under a checkpoint.

torchrun ... -m rsft_lib.evaluation.score --checkpoint CHECKPOINT --data TOKENS --output FOLDER

token_loss.bin   float32, one per token of the store, in order; NaN for untrained tokens
manifest.json    checkpoint, data, and the mean loss
"""

if __name__ == "__main__":
    from rsft_lib.common.parent_death import die_with_parent

    die_with_parent()

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from torch.distributed.elastic.multiprocessing.errors import record

from rsft_lib.checkpoint.sharded import load_weights
from rsft_lib.common.artifact import MANIFEST, file_hash, new_folder
from rsft_lib.common.device import device
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.evaluation.token_losses import FILE
from rsft_lib.model.attention import samples_of
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import ResponseModel, build_model, resolve_backend
from rsft_lib.model.loss_head import Targets
from rsft_lib.model.transformer_config import transformer_config

POSITIONS = 2048  # of a pack, at least: many short samples at once
SCORED = "scored {} of {} packs"  # printed once a second


def score(checkpoint: str | Path, data: str | Path, output: str | Path) -> Path | None:
    """Write the losses of all trained tokens, with packs distributed over ranks.

    Returns:
        The folder on rank 0, None on other ranks.

    Raises:
        FileNotFoundError: the checkpoint or the data is missing or unfinished.
        FileExistsError: `output` was not made by scoring, or has losses of other data or another checkpoint.
    """
    checkpoint, store = require_path(checkpoint, "checkpoint"), TokenStore(require_path(data, "data"))
    positions = max(int(store.lengths.max()) - 1, POSITIONS)
    model = _model(checkpoint, positions)
    dataset = PackedDataset(store, positions, seed=0)
    rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses, shown = torch.full((int(store.ends[-1]),), torch.nan), 0.0
    for index in range(rank, len(dataset), world):
        if rank == 0 and time.monotonic() > shown + 1:
            print(SCORED.format(index, len(dataset)), flush=True)
            shown = time.monotonic()
        places, values = _pack_losses(model, dataset, index)
        losses[places] = values
    # Each loss is finite on one rank and NaN on the others.
    known = losses.isfinite()
    losses = losses.where(known, 0.0)
    for part in (losses, counts := known.to(torch.uint8)):
        _sum_over_ranks(part)
    if torch.distributed.get_rank() > 0:
        return None
    losses = losses.where(counts.bool(), torch.nan).numpy()
    facts = {
        "made_by": "score", "checkpoint": str(checkpoint), "data": str(store.folder),
        "data_sha256": file_hash(store.folder / MANIFEST),
        "tokens": int(counts.sum()), "loss": float(np.nanmean(losses)),
    }  # fmt: skip
    with new_folder(resolve(output), facts, source=["checkpoint", "data"]) as folder:
        losses.tofile(folder / FILE)
    return resolve(output)


def _model(checkpoint: Path, longest: int) -> ResponseModel:
    hf, cuda = read_config(checkpoint), torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    backend = resolve_backend("auto")
    settings = transformer_config(hf, backend, params_dtype=dtype, bf16=cuda)
    model = build_model(hf, settings, backend, longest).to(device(), dtype)
    load_weights(model, checkpoint)
    return model.eval()


@torch.no_grad()
def _pack_losses(model: ResponseModel, dataset: PackedDataset, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions in the store int64 [n], losses float32 [n]) of the trained tokens of one pack."""
    batch, store = dataset.batch([index]), dataset.store
    positions = (batch["loss_mask"][0] > 0).nonzero()[:, 0]
    targets = Targets(positions, batch["labels"][0, positions], batch["loss_mask"][0, positions])
    output = model(
        batch["tokens"].to(device()), batch["position_ids"].to(device()),
        labels=Targets(*(tensor.to(device()) for tensor in targets)),
        samples=samples_of(batch["cu_seqlens"].tolist(), device()),
    )  # fmt: skip
    # A position predicts the next token.
    labels = [np.arange(store.ends[s] - store.lengths[s] + 1, store.ends[s]) for s in dataset.samples([index])]
    return torch.from_numpy(np.concatenate(labels))[positions], -output.log_probabilities[:, 0].cpu()


def _sum_over_ranks(values: torch.Tensor) -> None:
    moved = values.to(device())
    torch.distributed.all_reduce(moved)
    values.copy_(moved)


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "data", "output"):
        parser.add_argument(f"--{name}", required=True, help="a folder")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ranks():
        score(arguments.checkpoint, arguments.data, arguments.output)


if __name__ == "__main__":
    main()
