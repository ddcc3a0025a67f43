"""What a run trains on and is evaluated on, and what is known of where it came from."""

from dataclasses import dataclass

from rsft_lib.artifact import MANIFEST, file_hash
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.spans import control_tokens
from rsft_lib.data.store import TokenStore
from rsft_lib.paths import existing
from rsft_lib.training.config import TrainConfig

TOLD = ("tokenizer_sha256", "template_sha256", "max_length")  # of the store's manifest, where it has them


@dataclass(frozen=True)
class Datasets:
    """Packed samples for training, and for evaluation and a test at the end where there are any."""

    train: PackedDataset
    held_out: PackedDataset | None
    test: PackedDataset | None

    def facts(self) -> dict:
        """What must be the same when a run is continued."""
        manifest = self.train.store.manifest
        told = {name: manifest[name] for name in TOLD if name in manifest}
        return told | {
            "manifest_sha256": file_hash(self.train.store.folder / MANIFEST),
            "packs": len(self.train),
            "plan_sha256": self.train.plan_sha256(),
        }


def open_datasets(config: TrainConfig) -> Datasets:
    """The data of a run.

    Raises:
        FileNotFoundError: a folder is missing or unfinished.
        ValueError: a sample does not fit, or the split leaves nothing to train on.
    """
    store = TokenStore(existing(config.data, "data"))
    if config.eval_data:
        held_out = TokenStore(existing(config.eval_data, "eval_data"))
        return Datasets(_packed(config, store), _packed(config, held_out), None)
    parts = split(len(store), config.split)
    if not parts[0]:
        raise ValueError(f"split {config.split!r} of {len(store)} samples in {store.folder} leaves none to train on")
    return Datasets(*(_packed(config, store, part) if part else None for part in parts))


def split(samples: int, shares: str) -> tuple[range, ...]:
    """Sample numbers for training, evaluation and test, one after the other, rounded as Megatron-LM does.

    >>> split(2000, "999,1,0")
    (range(0, 1998), range(1998, 2000), range(2000, 2000))
    """
    weights = [int(share) for share in shares.split(",")]
    ends = [round(samples * sum(weights[: i + 1]) / sum(weights)) for i in range(3)]
    return tuple(range(first, end) for first, end in zip([0, *ends[:2]], ends, strict=True))


def _packed(config: TrainConfig, store: TokenStore, samples: range | None = None) -> PackedDataset:
    return PackedDataset(
        store, config.seq_length, config.seed, samples=samples, packing=config.packing,
        normalize_by=config.normalize_by, control=control_tokens(store),
    )  # fmt: skip
