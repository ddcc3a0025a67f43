"""Training, held-out and test data of a run, and the facts that identify them."""

from dataclasses import dataclass, field

from rsft_lib.common.artifact import MANIFEST, file_hash
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.span_kinds import control_tokens
from rsft_lib.data.store import TokenStore
from rsft_lib.tokenizer.patch import fingerprint
from rsft_lib.training.config import TrainConfig

RECORDED = ("tokenizer_sha256", "template_sha256", "options")  # fields of the store's manifest, if present


@dataclass(frozen=True)
class Datasets:
    """Packed samples for training and, optionally, for evaluation (and more of it, by name) and a test at the end."""

    train: PackedDataset
    held_out: PackedDataset | None
    test: PackedDataset | None
    more: dict[str, PackedDataset] = field(default_factory=dict)

    def evaluated(self) -> dict[str, PackedDataset]:
        """What is evaluated in between, by the beginning of its metrics."""
        main = {"eval_": self.held_out} if self.held_out else {}
        return main | {f"eval_{name}_": data for name, data in self.more.items()}

    def facts(self) -> dict:
        """Facts that must not change when a run is resumed."""
        manifest = self.train.store.manifest
        recorded = {name: manifest[name] for name in RECORDED if name in manifest}
        return recorded | {
            "manifest_sha256": file_hash(self.train.store.folder / MANIFEST),
            "packs": len(self.train),
            "plan_sha256": self.train.plan_sha256(),
        }


def open_datasets(config: TrainConfig) -> Datasets:
    """The data of a run.

    Raises:
        FileNotFoundError: a folder is missing or unfinished.
        ValueError: a sample is too long, the split leaves no training data, or the tokenizer has changed since the data
            was tokenized.
    """
    store = TokenStore(require_path(config.data, "data"))
    refuse_another_tokenizer(store)
    more = {name: _held_out(config, store, folder, "eval_more") for name, folder in config.more_held_out().items()}
    if config.eval_data:
        return Datasets(_packed(config, store), _held_out(config, store, config.eval_data, "eval_data"), None, more)
    train, held, test = split(len(store), config.split)
    if not train:
        raise ValueError(f"split {config.split!r} of {len(store)} samples in {store.folder} leaves no training samples")
    held_out, tested = (_packed(config, store, part) if part else None for part in (held, test))
    return Datasets(_packed(config, store, train), held_out, tested, more)


def _held_out(config: TrainConfig, store: TokenStore, folder: str, setting: str) -> PackedDataset:
    """Held-out data in a folder of its own, tokenized as the training data in `store`."""
    held_out = TokenStore(require_path(folder, setting))
    for name in ("tokenizer_sha256", "template_sha256"):
        if held_out.manifest.get(name) != store.manifest.get(name):
            raise ValueError(
                f"{held_out.folder} and {store.folder} differ in {name}: tokenize both with the same tokenizer"
            )
    return _packed(config, held_out)


def refuse_another_tokenizer(store: TokenStore) -> None:
    """Refuse data if its tokenizer has changed since: the model would be served with other tokens than trained on.

    Raises:
        ValueError: `tokenizer.json` or the chat template in the tokenizer's folder has changed.
    """
    folder = resolve(store.manifest.get("tokenizer", ""))
    if not store.manifest.get("tokenizer") or not (folder / "tokenizer.json").is_file():
        return
    changed = [name for name, value in fingerprint(folder).items() if value != store.manifest.get(name)]
    if changed:
        raise ValueError(
            f"{' and '.join(changed)} of {folder} changed after {store.folder} was tokenized: tokenize again "
            "(notebook 04_tokenize_and_inspect)"
        )


def split(samples: int, shares: str) -> tuple[range, ...]:
    """Consecutive ranges of samples for training, evaluation and test, rounded like Megatron-LM.

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
