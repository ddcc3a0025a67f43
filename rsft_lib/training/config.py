"""Everything that decides a training run, in one place. Defaults are those of the original's launch script."""

import dataclasses
import difflib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

SHAPES_THE_RUN = (  # besides model and data, which are compared by hash, and train_iters, which may grow
    "seq_length", "global_batch_size", "packing", "normalize_by", "split", "lr", "min_lr", "warmup_fraction",
    "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "seed", "precision",
)  # fmt: skip
CHOICES = {
    "precision": ("bf16", "fp32", "fp8"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise"),
    "backend": ("auto", "te", "torch"),
    "recompute": ("none", "selective", "full"),
    "moments": ("fp32", "bf16"),
    "gradients": ("fp32", "bf16"),
    "normalize_by": ("token", "sample"),
}
MAY_BE_ZERO = {"seed", "keep_last", "keep_every", "hang_timeout"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    checkpoint: str
    """What to start from: a converted checkpoint or a model folder."""
    data: str
    """Tokenized training data: a folder."""
    output: str
    """Run folder: `config.json`, `metrics.jsonl`, `train.log` and the checkpoints `iter_0000000`."""
    eval_data: str = ""
    """Tokenized held-out data: a folder; empty for what `split` holds out."""
    split: str = "999,1,0"
    """Where `eval_data` is empty: shares of `data`, in its order, for training, evaluation and a test at the end."""

    seq_length: int = 16384
    """Positions in a pack; the longest sample that can be trained has one token more."""
    micro_batch_size: int = 1
    """Packs in one forward pass of one rank."""
    global_batch_size: int = 128
    """Packs in one optimizer step, over all ranks."""
    packing: bool = True
    """Whether samples share packs; otherwise each is padded to `seq_length`."""
    normalize_by: str = "token"
    """'token': every trained token of a step weighs the same; 'sample': every sample does."""
    train_iters: int = 17_000
    """Optimizer steps. A larger number continues a finished run; the learning-rate schedule is recomputed for it."""
    epochs: float = 0.0
    """Passes over the data; overrides `train_iters` unless it is 0."""

    lr: float = 1e-5
    """Highest learning rate, reached after warm-up."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup_fraction: float = 0.05
    """Share of `train_iters` in which the learning rate rises."""
    weight_decay: float = 0.1
    """AdamW's decay of weight matrices; biases and norms are not decayed."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of AdamW's mean of squared gradients."""
    clip_grad: float = 1.0
    """Largest norm of the gradient of the whole model; 0 for no clipping."""
    seed: int = 1234
    """Decides the order of the packs."""

    precision: str = "bf16"
    """'bf16' with fp32 master weights, 'fp8' products with the same, or 'fp32'."""
    fp8_recipe: str = "tensorwise"
    """How FP8 scales are found: 'tensorwise', 'blockwise', or the fastest, 'delayed', whose history of scales no
    checkpoint holds: a resumed run begins a new one, so it is not bit for bit the run that it continues."""
    backend: str = "auto"
    """Attention from Transformer Engine ('te'), PyTorch ('torch'), or TE where it can run ('auto')."""
    recompute: str = "none"
    """What the backward pass computes again: 'none', 'selective' (the wide products of the MLP) or 'full' (layers)."""
    moments: str = "fp32"
    """Precision of AdamW's moments: 'fp32', or 'bf16' for 4 bytes less a parameter."""
    gradients: str = "fp32"
    """Precision in which gradients are summed: 'fp32', or 'bf16' for 2 bytes less a parameter."""

    tensor_parallel: int = 1
    """Ranks over which every layer is split."""
    sequence_parallel: bool = False
    """Whether those ranks also share out the tokens between the products of a layer."""
    pipeline_parallel: int = 1
    """Ranks over which the layers are dealt out."""
    virtual_pipeline: int = 1
    """Groups of layers that each pipeline rank has; more than one interleaves them."""
    context_parallel: int = 1
    """Ranks over which the tokens of a pack are split."""
    overlap: bool = True
    """Whether data-parallel ranks exchange gradients and weights while they compute."""

    save_interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 0
    """Checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Besides `keep_last`, keep the checkpoints of steps that divide by this; 0 for none."""
    async_save: bool = False
    """Whether training goes on while a checkpoint is written."""
    save_timeout: int = 1800
    """Seconds after which a save that is not done ends the run, or the reading of a checkpoint at its start."""
    hang_timeout: int = 45
    """Seconds without progress, or eight times the longest micro-batch so far, that end the run; 0 for never."""
    time_limit: float = 0.0
    """Minutes after which the run is saved and stopped; 0 for none."""

    log_interval: int = 10
    """Steps between lines in the log; `metrics.jsonl` has every step."""
    eval_interval: int = 100
    """Steps between evaluations; the last step is always evaluated."""
    eval_iters: int = 10
    """Batches of `global_batch_size` packs in one evaluation; fewer when the held-out data ends before."""
    tensorboard: bool = False
    """Whether to write TensorBoard's files into `output/tensorboard`."""
    wandb_project: str = ""
    """Weights & Biases project to report to; empty for none."""
    alarm_stop: bool = False
    """Whether an alarm (loss spike, mode collapse) stops the run; it is always written down."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check(field)
        for problem, holds in self._contradictions():
            if holds:
                raise ValueError(problem)

    def _check(self, field: dataclasses.Field) -> None:
        name, value = field.name, getattr(self, field.name)
        least = 0 if name in MAY_BE_ZERO else 1
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if field.type is float and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"{name} is {value!r}; it must be a number and not negative")
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; it must be a text")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; choose {', '.join(map(repr, CHOICES[name]))}")

    def _contradictions(self) -> list[tuple[str, bool]]:
        """(what is wrong, whether it is) for settings that do not go together."""
        row, pieces = self.seq_length * self.micro_batch_size, 2 * self.context_parallel
        importable = lambda name: importlib.util.find_spec(name) is not None  # noqa: E731
        return [
            (f"min_lr {self.min_lr} is above lr {self.lr}", self.min_lr > self.lr),
            (f"warmup_fraction is {self.warmup_fraction}; it is a share, from 0 to 1", self.warmup_fraction > 1),
            (f"adam_beta1 is {self.adam_beta1}; it must be below 1", self.adam_beta1 >= 1),
            (f"adam_beta2 is {self.adam_beta2}; it must be below 1", self.adam_beta2 >= 1),
            (
                "precision 'fp8' needs Transformer Engine; backend is 'torch'",
                self.precision == "fp8" and self.backend == "torch",
            ),
            (
                "backend 'te' has no attention in precision 'fp32'; leave backend at 'auto'",
                self.precision == "fp32" and self.backend == "te",
            ),
            (
                "moments 'bf16' and gradients 'bf16' are for precision 'bf16' and 'fp8'; precision is 'fp32'",
                self.precision == "fp32" and "bf16" in (self.moments, self.gradients),
            ),
            ("sequence_parallel needs tensor_parallel above 1", self.sequence_parallel and self.tensor_parallel == 1),
            (
                "virtual_pipeline needs pipeline_parallel above 1",
                self.virtual_pipeline > 1 and self.pipeline_parallel == 1,
            ),
            (
                f"seq_length {self.seq_length} x micro_batch_size {self.micro_batch_size} does not divide by "
                f"2 x context_parallel {self.context_parallel}",
                self.context_parallel > 1 and row % pieces > 0,
            ),
            (
                f"the {row // self.context_parallel} tokens of a context-parallel rank do not divide by "
                f"tensor_parallel {self.tensor_parallel}, as sequence_parallel needs",
                self.sequence_parallel and row // self.context_parallel % self.tensor_parallel > 0,
            ),
            (
                f"keep_every {self.keep_every} is no multiple of save_interval {self.save_interval}",
                self.keep_every % self.save_interval > 0,
            ),
            ("keep_every needs keep_last: without it everything is kept", self.keep_every > 0 and self.keep_last == 0),
            (
                "tensorboard is asked for but not installed: pip install tensorboard",
                self.tensorboard and not importable("tensorboard"),
            ),
            (
                "wandb_project is set but wandb is not installed: pip install wandb",
                bool(self.wandb_project) and not importable("wandb"),
            ),
            (f"split is {self.split!r}; it must be three numbers, e.g. '999,1,0'", not _is_split(self.split)),
        ]  # fmt: skip

    def data_parallel(self, world_size: int) -> int:
        """Replicas of the model on `world_size` ranks.

        Raises:
            ValueError: the ranks cannot be dealt out, or the global batch cannot be spread over the replicas.
        """
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if world_size < 1 or world_size % model:
            by_context = f" x context_parallel {self.context_parallel}" if self.context_parallel > 1 else ""
            raise ValueError(
                f"{world_size} ranks do not divide by tensor_parallel {self.tensor_parallel} x "
                f"pipeline_parallel {self.pipeline_parallel}{by_context}"
            )
        replicas = world_size // model
        if self.global_batch_size % (replicas * self.micro_batch_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide by micro_batch_size "
                f"{self.micro_batch_size} x {replicas} data-parallel ranks"
            )
        micro_batches = self.global_batch_size // (replicas * self.micro_batch_size)
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline_parallel:
            raise ValueError(
                f"virtual_pipeline needs the {micro_batches} micro-batches of a rank to divide by "
                f"pipeline_parallel {self.pipeline_parallel}"
            )
        return replicas

    def for_packs(self, packs: int) -> "TrainConfig":
        """These settings with `epochs`, where set, converted to `train_iters` for data of `packs` packs."""
        if not self.epochs:
            return self
        return dataclasses.replace(self, train_iters=max(1, math.ceil(self.epochs * packs / self.global_batch_size)))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_file(cls, path: Path) -> "TrainConfig":
        """Read a JSON or YAML file of settings.

        Raises:
            ValueError: the file names a setting that does not exist, or a value is none.
        """
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected lines of the form `name: value`")
        names = {field.name: field.type for field in dataclasses.fields(cls)}
        for name in values.keys() - names.keys():
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        # YAML takes 1e-5 for a text.
        return cls(**{name: _number(value) if names[name] is float else value for name, value in values.items()})


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_split(split: str) -> bool:
    shares = split.split(",")
    return len(shares) == 3 and all(share.strip().isdigit() for share in shares) and int(shares[0]) > 0
