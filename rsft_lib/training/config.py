"""Everything that decides a training run, in one place. Defaults are those of the original's launch script."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

SHAPES_THE_RUN = (
    "checkpoint", "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr", "min_lr",
    "warmup_fraction", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "seed", "precision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    checkpoint: str
    """Converted checkpoint to start from: a folder."""
    data: str
    """Tokenized training data: a folder."""
    output: str
    """Run folder: `config.json`, `metrics.jsonl`, `train.log` and the checkpoints `iter_0000000`."""
    eval_data: str = ""
    """Tokenized held-out data: a folder; empty for no evaluation."""

    seq_length: int = 16384
    """Positions in a pack; the longest sample that can be trained has one token more."""
    micro_batch_size: int = 1
    """Packs in one forward pass of one rank."""
    global_batch_size: int = 128
    """Packs in one optimizer step, over all ranks."""
    train_iters: int = 17_000
    """Optimizer steps."""

    lr: float = 1e-5
    """Highest learning rate, reached after warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_fraction: float = 0.05
    """Share of `train_iters` in which the learning rate rises."""
    weight_decay: float = 0.1
    """AdamW's decay of weight matrices; biases and norms are not decayed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    clip_grad: float = 1.0
    """Largest norm of the gradient of the whole model; 0 for no clipping."""
    seed: int = 1234
    """Decides the order of the packs."""

    precision: str = "bf16"
    """'bf16' (with fp32 master weights) or 'fp32'."""
    backend: str = "auto"
    """Layers from Transformer Engine ('te'), PyTorch ('torch'), or TE where it can run ('auto')."""
    tensor_parallel: int = 1
    """Ranks over which every layer is split."""
    pipeline_parallel: int = 1
    """Ranks over which the layers are dealt out."""

    save_interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    log_interval: int = 10
    """Steps between lines in the log; `metrics.jsonl` has every step."""
    eval_interval: int = 100
    """Steps between evaluations; the last step is always evaluated."""
    eval_iters: int = 10
    """Batches of `global_batch_size` packs in one evaluation; fewer when the held-out data ends before."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < (0 if field.name == "seed" else 1)):
                raise ValueError(f"{field.name} is {value!r}; it must be a whole number of at least 1")
            if field.type is float and not value >= 0:
                raise ValueError(f"{field.name} is {value!r}; it must not be negative")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is {self.precision!r}; choose 'bf16' or 'fp32'")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")

    def data_parallel(self, world_size: int) -> int:
        """Replicas of the model on `world_size` ranks.

        Raises:
            ValueError: the ranks cannot be dealt out, or the global batch cannot be spread over the replicas.
        """
        model = self.tensor_parallel * self.pipeline_parallel
        if world_size < 1 or world_size % model:
            raise ValueError(
                f"{world_size} ranks do not divide by tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel}"
            )
        replicas = world_size // model
        if self.global_batch_size % (replicas * self.micro_batch_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide by micro_batch_size "
                f"{self.micro_batch_size} x {replicas} data-parallel ranks"
            )
        return replicas

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, path: Path) -> "TrainConfig":
        """Read what `to_json` gave.

        Raises:
            ValueError: the file names a setting that does not exist.
        """
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{path}: unknown settings {sorted(unknown)}")
        return cls(**values)
