"""What a run trains on and is evaluated on, and what is known of where it came from."""

from dataclasses import dataclass

from rsft_lib.common.artifact import MANIFEST, file_hash
from rsft_lib.common.paths import existing, resolve
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.span_kinds import control_tokens
from rsft_lib.data.store import TokenStore
from rsft_lib.tokenizer.patch import fingerprint
from rsft_lib.training.config import TrainConfig

TOLD = ("tokenizer_sha256", "template_sha256", "options")  # of the store's manifest, where it has them


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
        ValueError: a sample does not fit, the split leaves nothing to train on, or the tokenizer is not what it was
            when the data was tokenized.
    """
    store = TokenStore(existing(config.data, "data"))
    refuse_another_tokenizer(store)
    if config.eval_data:
        held_out = TokenStore(existing(config.eval_data, "eval_data"))
        for name in ("tokenizer_sha256", "template_sha256"):
            if held_out.manifest.get(name) != store.manifest.get(name):
                raise ValueError(
                    f"{held_out.folder} and {store.folder} differ in {name}: tokenize both with the same tokenizer"
                )
        return Datasets(_packed(config, store), _packed(config, held_out), None)
    parts = split(len(store), config.split)
    if not parts[0]:
        raise ValueError(f"split {config.split!r} of {len(store)} samples in {store.folder} leaves none to train on")
    return Datasets(*(_packed(config, store, part) if part else None for part in parts))


def refuse_another_tokenizer(store: TokenStore) -> None:
    """What is trained would not be what is served if the tokenizer changed after the data was made.

    Raises:
        ValueError: the tokenizer's folder is there and has another `tokenizer.json` or chat template than then.
    """
    folder = resolve(store.manifest.get("tokenizer", ""))
    if not store.manifest.get("tokenizer") or not (folder / "tokenizer.json").is_file():
        return
    changed = [name for name, value in fingerprint(folder).items() if value != store.manifest.get(name)]
    if changed:
        raise ValueError(
            f"{store.folder} was made with another {' and '.join(changed)} than {folder} has now: tokenize again "
            "(notebook 04_tokenize_and_inspect)"
        )


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
