"""The losses that `evaluation.score` has written, by sample."""

from pathlib import Path

import numpy as np

from rsft_lib.common.artifact import MANIFEST, file_hash, read_manifest
from rsft_lib.common.paths import require_path
from rsft_lib.data.store import TokenStore

FILE = "token_loss.bin"


class TokenLosses:
    """The output of `score`: `losses[i]` is float32 [n], the loss in nats of each token of sample i; NaN: untrained."""

    def __init__(self, folder: str | Path):
        """Open a finished folder.

        Raises:
            FileNotFoundError: the folder or its data is missing or unfinished.
            ValueError: the data has changed since.
        """
        folder = require_path(folder, "folder of token losses")
        self.manifest = read_manifest(folder)
        self.store = TokenStore(require_path(self.manifest["data"], "data"))
        if file_hash(self.store.folder / MANIFEST) != self.manifest["data_sha256"]:
            raise ValueError(f"{self.store.folder} has changed since {folder} was written: score again")
        self.values = np.memmap(folder / FILE, dtype=np.float32, mode="r")

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> np.ndarray:
        end = self.store.ends[index]
        return np.array(self.values[end - self.store.lengths[index] : end])
