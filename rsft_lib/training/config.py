"""All settings of a training run. Defaults are those of the launch script of Reasoning-SFT, this kit's predecessor."""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from rsft_lib.common.mappings import pairs

SHAPES_THE_RUN = (  # besides model and data, which are compared by hash, and train_iters, which may grow
    "seq_length", "global_batch_size", "packing", "normalize_by", "split", "lr", "min_lr", "lr_schedule",
    "warmup_fraction", "decay_fraction", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "seed", "precision",
    "freeze_router", "router_aux_loss",
)  # fmt: skip
CHOICES = {
    "precision": ("bf16", "fp32", "fp8"),
    "fp8_recipe": ("delayed", "tensorwise", "blockwise"),
    "backend": ("auto", "te", "torch"),
    "recompute": ("none", "selective", "full"),
    "moments": ("fp32", "bf16"),
    "gradients": ("fp32", "bf16"),
    "normalize_by": ("token", "sample"),
    "lr_schedule": ("constant", "linear", "cosine", "wsd"),
}
BEST = re.compile(r"eval_(.+_)?loss(_.+)?|(think|short|choice|answer)_(accuracy|well_formed)")  # for keep_best
MAY_BE_ZERO = {
    "seed", "keep_last", "keep_every", "hang_timeout", "eval_generate_every", "eval_max_new_tokens", "recompute_layers",
}  # fmt: skip


def explained(cls: type) -> type:
    """Add the fields of a class, each with the string below it, to its docstring, for `help`."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            cls.__doc__ = f"{cls.__doc__}\n\n{ast.unparse(field)}\n    {text.value.value!s}"
    return cls


@explained
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a training."""

    checkpoint: str
    """Initial weights: a converted checkpoint or a model folder."""
    data: str
    """Folder with tokenized training data."""
    output: str
    """Run folder: `config.json`, `metrics.jsonl`, `train.log` and the checkpoints `iter_0000000`."""
    eval_data: str = ""
    """Folder with tokenized held-out (evaluation) data; empty to use the evaluation share of `split`."""
    eval_more: str = ""
    """More held-out data, each evaluated by itself: `name -> folder`, comma-separated. Its loss is `eval_NAME_loss`."""
    split: str = "999,1,0"
    """If `eval_data` is empty: shares of `data`, in its order, for training, evaluation and a final test."""

    seq_length: int = 16384
    """Positions per pack (sequence length); the longest sample that can be trained has one token more."""
    micro_batch_size: int = 1
    """Packs per forward pass and rank."""
    global_batch_size: int = 128
    """Packs per optimizer step, over all ranks."""
    packing: bool = True
    """Whether a pack holds several samples; otherwise each sample is padded to `seq_length`."""
    normalize_by: str = "token"
    """'token': every trained token has the same weight in the loss of a step; 'sample': every sample has."""
    train_iters: int = 17_000
    """Optimizer steps. A larger number continues a finished run; the learning-rate schedule is recomputed for it."""
    epochs: float = 0.0
    """Passes over the data, instead of `train_iters`; 0 to use `train_iters`."""

    lr: float = 1e-5
    """Peak learning rate, reached after warm-up."""
    min_lr: float = 1e-6
    """Final learning rate."""
    lr_schedule: str = "cosine"
    """After warm-up: 'constant', 'linear', 'cosine', or 'wsd' (constant, then linear; arXiv:2404.06395)."""
    warmup_fraction: float = 0.05
    """Share of `train_iters` with linear learning-rate warm-up."""
    decay_fraction: float = 0.1
    """Share of `train_iters` at the end in which 'wsd' goes down to `min_lr`."""
    weight_decay: float = 0.1
    """AdamW weight decay, for weight matrices only; biases and norms are not decayed."""
    adam_beta1: float = 0.9
    """AdamW beta1: decay rate of the first moment."""
    adam_beta2: float = 0.95
    """AdamW beta2: decay rate of the second moment."""
    clip_grad: float = 1.0
    """Gradient clipping: maximum global L2 norm; 0 for no clipping."""
    seed: int = 1234
    """Random seed for the order of the packs."""

    precision: str = "bf16"
    """'bf16' with fp32 master weights, the same with matrix products in 'fp8', or 'fp32'."""
    fp8_recipe: str = "tensorwise"
    """FP8 scaling: 'tensorwise', 'blockwise', or the fastest, 'delayed'. The scale history of 'delayed' is not saved in
    checkpoints, so a resumed run is not bit for bit identical to an uninterrupted one."""
    backend: str = "auto"
    """Attention of Transformer Engine ('te') or PyTorch ('torch'), or of TE where it runs ('auto')."""
    recompute: str = "none"
    """Activation recomputation: 'none', 'selective' (the wide products of the MLP) or 'full' (whole layers)."""
    recompute_layers: int = 0
    """Layers of each pipeline stage (or chunk, with `virtual_pipeline`) with `recompute`; 0 for all. The others
    recompute nothing if it is 'selective', and what 'selective' does if it is 'full'; so memory is used up."""
    moments: str = "fp32"
    """Dtype of AdamW's moments: 'fp32', or 'bf16' to save 4 bytes per parameter."""
    gradients: str = "fp32"
    """Dtype of gradient accumulation: 'fp32', or 'bf16' to save 2 bytes per parameter."""

    tensor_parallel: int = 1
    """Tensor-parallel size: ranks across which each layer is partitioned."""
    sequence_parallel: bool = False
    """Whether tokens are also sharded across the tensor-parallel ranks, between the matrix products of a layer."""
    tensor_overlap: bool = False
    """Whether tensor-parallel communication overlaps with matrix products, through Transformer Engine's user buffers.
    Needs `sequence_parallel`, and 2, 4 or 8 tensor-parallel ranks on one machine. megatron-core does not count it among
    what a resumed run repeats bit for bit."""
    pipeline_parallel: int = 1
    """Pipeline-parallel size: ranks across which the layers are partitioned."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank; above 1 for the interleaved schedule."""
    context_parallel: int = 1
    """Context-parallel size: ranks across which the tokens of a pack are partitioned."""
    expert_parallel: int = 1
    """Expert-parallel size: ranks, of different data, across which the experts of a layer are partitioned."""
    expert_tensor_parallel: int = 1
    """Expert-tensor-parallel size: ranks across which each expert is partitioned."""
    router_aux_loss: float = 0.0
    """Coefficient of the auxiliary loss that balances the experts (arXiv:2101.03961), averaged over layers; 0: none."""
    freeze_router: bool = False
    """Whether the routers of a model with experts keep their weights."""
    overlap: bool = True
    """Whether data-parallel communication of gradients and weights overlaps with computation."""

    save_interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 0
    """Checkpoints to keep; 0 for all."""
    keep_every: int = 0
    """Besides `keep_last`, keep the checkpoints of steps that are multiples of this; 0 for none."""
    keep_best: str = ""
    """Besides these, keep the checkpoint that was best by this metric of an evaluation, such as `eval_loss` (lowest) or
    `choice_accuracy` (highest); empty for none. Checkpoints are compared whose step was evaluated."""
    async_save: bool = False
    """Whether training continues while a checkpoint is written."""
    save_timeout: int = 1800
    """Maximum seconds to save a checkpoint, or to load one at the start; a timeout ends the run."""
    hang_timeout: int = 45
    """Seconds without progress (at least eight times the longest micro-batch) after which the run ends; 0 for never."""
    time_limit: float = 0.0
    """Minutes after which the run saves and stops; 0 for no limit."""

    log_interval: int = 10
    """Steps between log lines; `metrics.jsonl` has every step."""
    eval_interval: int = 100
    """Steps between evaluations; a new run also evaluates before its first step, and every run after its last."""
    eval_iters: int = 10
    """Batches of `global_batch_size` packs per evaluation; fewer if the held-out data ends before."""
    eval_generate_every: int = 0
    """Steps between answers to held-out questions, in each mode and by the model's choice, before the first step and
    after the last as well; 0 for never."""
    eval_questions: str = ""
    """Records (JSON Lines) with these questions; empty for those from which `eval_data` was tokenized. Without either,
    none are asked."""
    eval_question_count: int = 64
    """Number of questions, the first ones."""
    eval_max_new_tokens: int = 1024
    """Maximum tokens per answer, also in memory; 0 for a quarter more than the longest held-out answer."""
    tensorboard: bool = False
    """Whether to write TensorBoard files to `output/tensorboard`."""
    wandb_project: str = ""
    """Weights & Biases project; empty for none."""
    alarm_stop: bool = False
    """Whether an alarm (loss spike, mode collapse, dead experts) stops the run; it is logged in any case."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check(field)
        for problem, holds in self._contradictions():
            if holds:
                raise ValueError(problem)
        self.more_held_out()

    def _check(self, field: dataclasses.Field) -> None:
        name, value = field.name, getattr(self, field.name)
        least = 0 if name in MAY_BE_ZERO else 1
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}")
        if field.type is float and not (isinstance(value, int | float) and 0 <= value < math.inf):
            raise ValueError(f"{name} is {value!r}; it must be a finite, non-negative number")
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r}; it must be a string")
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; choose {', '.join(map(repr, CHOICES[name]))}")

    def _contradictions(self) -> list[tuple[str, bool]]:
        """(error message, whether it applies) for combinations of settings."""
        row = self.seq_length * self.micro_batch_size
        importable = lambda name: importlib.util.find_spec(name) is not None  # noqa: E731
        return [
            (f"min_lr {self.min_lr} is above lr {self.lr}", self.min_lr > self.lr),
            (f"warmup_fraction is {self.warmup_fraction}; it must be a share from 0 to 1", self.warmup_fraction > 1),
            (
                f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} exceed the whole run",
                self.lr_schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1,
            ),
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
                "moments 'bf16' and gradients 'bf16' need precision 'bf16' or 'fp8'; precision is 'fp32'",
                self.precision == "fp32" and "bf16" in (self.moments, self.gradients),
            ),
            (
                f"recompute_layers={self.recompute_layers} needs recompute 'selective' or 'full'; it is 'none'",
                self.recompute_layers > 0 and self.recompute == "none",
            ),
            ("sequence_parallel needs tensor_parallel above 1", self.sequence_parallel and self.tensor_parallel == 1),
            ("tensor_overlap needs sequence_parallel", self.tensor_overlap and not self.sequence_parallel),
            (
                f"tensor_overlap needs tensor_parallel 2, 4 or 8; it is {self.tensor_parallel}",
                self.tensor_overlap and self.tensor_parallel not in (2, 4, 8),  # others have no kernel, and no error
            ),
            (
                "tensor_overlap needs Transformer Engine: backend 'auto' or 'te', and precision 'bf16' or 'fp8'",
                self.tensor_overlap and (self.backend == "torch" or self.precision == "fp32"),
            ),
            (
                "tensor_overlap exchanges no activations in FP8 by blocks; choose fp8_recipe 'tensorwise' or 'delayed'",
                self.tensor_overlap and self.precision == "fp8" and self.fp8_recipe == "blockwise",
            ),
            (
                "virtual_pipeline needs pipeline_parallel above 1",
                self.virtual_pipeline > 1 and self.pipeline_parallel == 1,
            ),
            (
                f"seq_length={self.seq_length} x micro_batch_size={self.micro_batch_size} is not divisible by "
                f"context_parallel={self.context_parallel}",
                row % self.context_parallel > 0,
            ),
            (
                f"the {row // self.context_parallel} tokens of a context-parallel rank are not divisible by "
                f"tensor_parallel={self.tensor_parallel}, as sequence_parallel requires",
                self.sequence_parallel and row // self.context_parallel % self.tensor_parallel > 0,
            ),
            (
                f"keep_every={self.keep_every} is not a multiple of save_interval={self.save_interval}",
                self.keep_every % self.save_interval > 0,
            ),
            ("keep_every needs keep_last: without it all are kept", self.keep_every > 0 and self.keep_last == 0),
            *self._best_contradictions(),
            (
                "tensorboard is true but not installed: pip install tensorboard",
                self.tensorboard and not importable("tensorboard"),
            ),
            (
                "wandb_project is set but wandb is not installed: pip install wandb",
                bool(self.wandb_project) and not importable("wandb"),
            ),
            (f"split is {self.split!r}; it must be three numbers, e.g. '999,1,0'", not _is_split(self.split)),
        ]  # fmt: skip

    def _best_contradictions(self) -> list[tuple[str, bool]]:
        """The same for `keep_best`: it must be a metric with a direction, measured whenever a checkpoint is saved."""
        answers = not self.keep_best.startswith("eval_")
        name = "eval_generate_every" if answers else "eval_interval"
        every, losses = getattr(self, name), ("eval_loss", *(f"eval_{one}_loss" for one in self.more_held_out()))
        return [] if not self.keep_best else [
            (
                f"keep_best is {self.keep_best!r}; it must be a held-out loss such as 'eval_loss', or the accuracy or "
                "well_formed share of answers, such as 'choice_accuracy'",
                not BEST.fullmatch(self.keep_best),
            ),
            (
                f"keep_best is {self.keep_best!r}, but the held-out losses are {', '.join(losses)}",
                not answers and not self.keep_best.startswith(losses),
            ),
            (f"keep_best={self.keep_best} needs {name}, which is 0", every == 0),
            (
                f"save_interval={self.save_interval} is not a multiple of {name}={every}: checkpoints would have no "
                f"{self.keep_best} for keep_best",
                self.save_interval % (every or 1) > 0,
            ),
        ]  # fmt: skip

    def more_held_out(self) -> dict[str, str]:
        """`eval_more` as name -> folder.

        Raises:
            ValueError: it is not of the form `name -> folder`, or a name is not made of letters, digits, - and _.
        """
        folders = pairs(self.eval_more)
        if wrong := [name for name in folders if not re.fullmatch(r"[\w-]+", name)]:
            raise ValueError(f"eval_more has the name {wrong[0]!r}; use letters, digits, - and _")
        return folders

    def layout(self) -> dict:
        """The parallel sizes, by the names that `model.config.check_layout` gives them."""
        names = (
            "tensor_parallel", "pipeline_parallel", "virtual_pipeline", "expert_parallel", "expert_tensor_parallel",
            "sequence_parallel",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def data_parallel(self, world_size: int) -> int:
        """The data-parallel size (replicas of the model) on `world_size` ranks.

        Raises:
            ValueError: the ranks are not divisible by the model-parallel sizes, or the global batch by the replicas.
        """
        model = self.tensor_parallel * self.pipeline_parallel * self.context_parallel
        if world_size < 1 or world_size % model:
            by_context = f" x context_parallel={self.context_parallel}" if self.context_parallel > 1 else ""
            raise ValueError(
                f"{world_size} ranks are not divisible by tensor_parallel={self.tensor_parallel} x "
                f"pipeline_parallel={self.pipeline_parallel}{by_context}"
            )
        experts = self.pipeline_parallel * self.expert_parallel * self.expert_tensor_parallel
        if world_size % experts:
            raise ValueError(
                f"{world_size} ranks are not divisible by pipeline_parallel={self.pipeline_parallel} x "
                f"expert_parallel={self.expert_parallel} x expert_tensor_parallel={self.expert_tensor_parallel}"
            )
        replicas = world_size // model
        if self.global_batch_size % (replicas * self.micro_batch_size):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size="
                f"{self.micro_batch_size} x {replicas} data-parallel ranks"
            )
        micro_batches = self.global_batch_size // (replicas * self.micro_batch_size)
        if self.virtual_pipeline > 1 and micro_batches % self.pipeline_parallel:
            raise ValueError(
                f"virtual_pipeline needs the {micro_batches} micro-batches of a rank to be divisible by "
                f"pipeline_parallel={self.pipeline_parallel}"
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
    def with_defaults(cls, recorded: dict) -> dict:
        """Recorded settings; those that an older version did not have get their defaults, which are what it did."""
        fields = dataclasses.fields(cls)
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING} | recorded

    @classmethod
    def from_file(cls, path: Path) -> "TrainConfig":
        """Read a JSON or YAML file of settings.

        Raises:
            ValueError: the file names a setting that does not exist, or a value is invalid.
        """
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected lines of the form `name: value`")
        names = {field.name: field.type for field in dataclasses.fields(cls)}
        for name in values.keys() - names.keys():
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{path}: unknown setting {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        # YAML reads 1e-5 as a string.
        return cls(**{name: _number(value) if names[name] is float else value for name, value in values.items()})


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _is_split(split: str) -> bool:
    shares = split.split(",")
    return len(shares) == 3 and all(share.strip().isdigit() for share in shares) and int(shares[0]) > 0
