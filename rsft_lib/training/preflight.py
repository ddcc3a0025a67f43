"""Estimates before a run starts: parameters, memory, disk, steps, time."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers import PretrainedConfig

from rsft_lib.common.paths import require_path, resolve
from rsft_lib.model.attention import heads_of_rank
from rsft_lib.model.config import check_layout, head_dim, read_config
from rsft_lib.model.cpu_shim import gpu
from rsft_lib.model.loss_head import CHUNK
from rsft_lib.model.weight_map import expert_count, expert_size, shared_expert_size
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.datasets import Datasets, open_datasets
from rsft_lib.training.flops import (
    layer_parameters,
    matmul_parameters,
    one_expert,
    parameters,
    peak_flops,
    training_flops,
)
from rsft_lib.training.metrics import scan_metrics

MEASURED = 100  # last steps of a run whose time is expected of the next
EXPECTED_MFU = 0.45  # assumed for GPUs; measured runs reach 0.5 and more with packs of 16,384 tokens
OVERLAP_BUFFERS = 12  # that Transformer Engine allocates for `tensor_overlap`, outside of torch's memory
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one rank by purpose, from shapes; excludes fragmentation and CUDA's own memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def preflight(config: TrainConfig, nproc: int) -> str:
    """Describe a run on `nproc` ranks of this machine.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the settings are inconsistent, or do not fit the model or the data.
    """
    config.data_parallel(nproc)
    return describe(config, read_config(require_path(config.checkpoint, "checkpoint")), open_datasets(config), nproc)


def check_model(config: TrainConfig, hf: PretrainedConfig) -> None:
    """Check that the settings fit the model and this machine.

    Raises:
        ValueError: they do not.
    """
    check_layout(hf, **config.layout())
    for name in ("freeze_router", "router_aux_loss"):
        if getattr(config, name) and not expert_count(hf):
            raise ValueError(f"{name} is set, but {hf.model_type} has no experts and no routers")
    if config.freeze_router and config.router_aux_loss:
        raise ValueError(
            f"router_aux_loss={config.router_aux_loss:g} has no effect with freeze_router: set one of them"
        )
    if min(config.expert_parallel, config.expert_tensor_parallel) > 1 and not torch.cuda.is_available():
        raise ValueError(
            "expert_parallel and expert_tensor_parallel together need GPUs: on CPUs, gloo cannot gather an unequal "
            "number of tokens from each rank"
        )


def _require_rows(hf: PretrainedConfig, data: Datasets) -> None:
    """Refuse data with tokens for which the model has no embedding row."""
    store = data.train.store
    if (tokens := store.manifest.get("vocab_size", 0)) > hf.vocab_size:
        raise ValueError(
            f"{store.folder} was tokenized with {tokens:,} tokens, but the model has {hf.vocab_size:,} embedding rows: "
            "convert it with that tokenizer in notebook 02, which adds rows, and train the result"
        )


def describe(config: TrainConfig, hf: PretrainedConfig, data: Datasets, ranks: int) -> str:
    """The text of `preflight`, which also starts the log of a run."""
    check_model(config, hf)
    _require_rows(hf, data)
    given, config = config, config.for_packs(len(data.train))
    overridden = given.train_iters != config.train_iters
    overrides = f"; epochs={config.epochs:g} overrides train_iters={given.train_iters}" if overridden else ""
    per_epoch = len(data.train) / config.global_batch_size
    lines = {
        "model": f"{parameters(hf):,} parameters, {matmul_parameters(hf):,} of them in matrix products",
        **_experts_line(config, hf),
        "ranks": _layout(config, ranks),
        "memory": _memory_line(config, hf, ranks),
        "step": f"{config.global_batch_size * config.seq_length:,} tokens in {config.global_batch_size} packs",
        "epoch": f"{per_epoch:,.1f} steps of {len(data.train):,} packs",
        "run": f"{config.train_iters:,} steps, {config.train_iters / per_epoch:,.1f} epochs{overrides}",
        "checkpoint": _checkpoint_line(config, hf),
        "saving": _saving_line(config, hf),
        "time": _time_line(config, hf, data, ranks),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def memory(config: TrainConfig, hf: PretrainedConfig, ranks: int) -> Memory:
    """Memory of the rank that needs most: the first or the last pipeline stage."""
    held, sharded = held_parameters(config, hf, ranks)
    moments = 2 * (2 if config.moments == "bf16" else 4)
    width = _width(config)
    tokens = config.seq_length * config.micro_batch_size / config.context_parallel
    vocabulary = hf.vocab_size / config.tensor_parallel
    saved, live = (values * tokens * width for values in _activations(config, hf))
    buffers = OVERLAP_BUFFERS * tokens * hf.hidden_size * width if config.tensor_overlap else 0
    loss = min(CHUNK, tokens) * vocabulary * width + 2 * tokens * hf.hidden_size * width
    # Transformer Engine keeps each weight of a layer in FP8 as well, by rows and by columns.
    copies = 2 * (held - _ends(config, hf)) if config.precision == "fp8" else 0
    return Memory(
        weights=held * width + copies,
        gradients=held * (2 if config.gradients == "bf16" else 4),
        optimizer=sharded * (moments + (2 if config.precision != "fp32" else 0)),
        activations=saved + live + buffers,
        loss=max(0.0, loss - live),  # it is over when the backward pass of the layers begins
    )


def held_parameters(config: TrainConfig, hf: PretrainedConfig, ranks: int) -> tuple[float, float]:
    """Parameters on the rank that has most, and those among them that its optimizer updates."""
    tensor, pipeline, context = config.tensor_parallel, config.pipeline_parallel, config.context_parallel
    experts = hf.num_hidden_layers * expert_count(hf) * one_expert(hf)
    layers = hf.num_hidden_layers * layer_parameters(hf) - experts
    held = layers / pipeline / tensor + _ends(config, hf)
    across = pipeline * config.expert_parallel * config.expert_tensor_parallel
    shards = config.data_parallel(ranks) * context
    return held + experts / across, held / shards + experts / across / (ranks // across)


def _ends(config: TrainConfig, hf: PretrainedConfig) -> float:
    """Parameters of embedding and output layer on a rank; they are on one rank without pipeline parallelism."""
    matrices = 1 if config.pipeline_parallel > 1 or hf.tie_word_embeddings else 2
    return matrices * hf.vocab_size * hf.hidden_size / config.tensor_parallel


def _activations(config: TrainConfig, hf: PretrainedConfig) -> tuple[float, float]:
    """Values per token that a rank saves for the backward pass, and those that the backward pass of a layer adds."""
    across = config.tensor_parallel if config.sequence_parallel else 1
    hidden, inner = hf.hidden_size / across, 2 * hf.intermediate_size / config.tensor_parallel
    heads, groups = (
        n * head_dim(hf) / config.tensor_parallel for n in (hf.num_attention_heads, hf.num_key_value_heads)
    )
    attention = 2 * (heads + groups)
    if config.context_parallel > 1:
        # Attention saves its own copies, for all tokens and some heads; groups may be on several ranks.
        _, repeated = context_parallel_width(config, hf)
        attention += heads + 2 * (repeated - groups)
    kept = 0.0  # by the MLP with selective recomputation
    # Activation, its gradient and that of the products before it; what is recomputed is there as well.
    live = {"none": 2 * inner, "selective": hidden + 3.3 * inner, "full": 2.5 * inner}[config.recompute]
    if expert_count(hf):
        # Inputs, the two products and the activation of each chosen expert; the last is what is recomputed.
        sizes = (hf.hidden_size + 2 * expert_size(hf), expert_size(hf))
        chosen, activation = (hf.num_experts_per_tok * size / across for size in sizes)
        kept = chosen + 3 * shared_expert_size(hf) / config.tensor_parallel
        inner = kept + activation
        live = 1.5 * inner + 4 * hidden
    # Residuals, and the outputs of norms, which `selective` recomputes.
    layer = {"none": 4 * hidden + attention + inner, "selective": 2 * hidden + attention + kept, "full": hidden}
    if config.precision == "fp8":
        # Inputs of products are kept in FP8, besides attention's output and in place of those of norms.
        layer["none"] += heads / 2 + inner / 4 - hidden
        layer["selective"] += heads / 2 + hidden / 2
    saved = layer[config.recompute] * hf.num_hidden_layers / config.pipeline_parallel
    if config.pipeline_parallel > 1:
        saved *= config.pipeline_parallel * (1 + (config.virtual_pipeline > 1))  # micro-batches of the first stage
    again = 4 * hidden + attention + (inner if expert_count(hf) else 0) if config.recompute == "full" else 0
    return saved, live + again


def context_parallel_width(config: TrainConfig, hf: PretrainedConfig) -> tuple[float, float]:
    """Width of the heads, and of the keys, per token of a context-parallel rank, with padded heads and repeated groups.

    Without context parallelism, those of a tensor-parallel rank.
    """
    heads, groups = (max(1, n // config.tensor_parallel) for n in (hf.num_attention_heads, hf.num_key_value_heads))
    own, own_groups = heads_of_rank(heads, groups, config.context_parallel)
    width = config.context_parallel * head_dim(hf)
    return own * width, own_groups * width


def _layout(config: TrainConfig, ranks: int) -> str:
    sizes = {
        "tensor": config.tensor_parallel, "pipeline": config.pipeline_parallel, "context": config.context_parallel,
        "data": config.data_parallel(ranks),
    }  # fmt: skip
    text = f"{ranks} = " + " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1 or name == "data")
    return text + (f"; {config.expert_parallel} of them with different experts" if config.expert_parallel > 1 else "")


def _experts_line(config: TrainConfig, hf: PretrainedConfig) -> dict[str, str]:
    if not expert_count(hf):
        return {}
    pretrained = getattr(hf, "router_aux_loss_coef", 0.0)
    because = f" (router_aux_loss_coef={pretrained:g} in config.json is not used)" if pretrained else ""
    return {
        "experts": f"{expert_count(hf)} per layer, {hf.num_experts_per_tok} per token, none dropped; router in float32"
        f"{', frozen' if config.freeze_router else ''}; router_aux_loss {config.router_aux_loss:g}{because}"
    }


def _memory_line(config: TrainConfig, hf: PretrainedConfig, ranks: int) -> str:
    need = memory(config, hf, ranks)
    parts = ", ".join(f"{name} {_size(getattr(need, name))}" for name in need.__dataclass_fields__)
    if device := gpu():
        available, what = device[1], "this GPU has"
    else:
        available, what = psutil.virtual_memory().total / ranks, "each rank's share of this machine is"
    fits = (
        ""
        if need.total < 0.95 * available
        else "  TOO LITTLE: set layout to 'auto', or see recompute, moments, gradients and the *_parallel settings"
    )
    return f"about {_size(need.total)} per rank ({parts}); {what} {_size(available)}{fits}"


def checkpoint_bytes(config: TrainConfig, hf: PretrainedConfig) -> int:
    """Bytes of a checkpoint: weights, and float32 master weights and moments."""
    return parameters(hf) * (_width(config) + 12)


def _checkpoint_line(config: TrainConfig, hf: PretrainedConfig) -> str:
    size = checkpoint_bytes(config, hf)
    kept = -(-config.train_iters // config.save_interval)
    if config.keep_last:
        kept = min(kept, config.keep_last + (config.train_iters // config.keep_every if config.keep_every else 0) + 1)
        kept += bool(config.keep_best)
    free = shutil.disk_usage(_first_existing(resolve(config.output))).free
    fits = "" if size * kept < free else "  TOO LITTLE: see keep_last"
    return f"{_size(size)} each, {kept} kept; {_size(free)} free in {config.output}{fits}"


def _saving_line(config: TrainConfig, hf: PretrainedConfig) -> str:
    if not config.async_save:
        return "tensor by tensor from memory, while training waits; see async_save"
    needed, available = checkpoint_bytes(config, hf), psutil.virtual_memory().total
    fits = "" if needed < available else "  TOO LITTLE: set async_save to false"
    memory = f"{_size(needed)} of main memory for all ranks together"
    return f"in the background, from {memory}; this machine has {_size(available)}{fits}"


def _width(config: TrainConfig) -> int:
    """Bytes per weight."""
    return 4 if config.precision == "fp32" else 2


def _size(bytes_: float) -> str:
    return f"{bytes_ / GIB:,.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:,.1f} MiB"


def _first_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _time_line(config: TrainConfig, hf: PretrainedConfig, data: Datasets, ranks: int) -> str:
    if done := scan_metrics(resolve(config.output)).records[-MEASURED:]:
        step, left = median(record["seconds"] for record in done), max(0, config.train_iters - done[-1]["iteration"])
        return f"{step:.3g} s per step as measured before; {left:,} more steps take {step * left / 60:,.1f} minutes"
    peak = peak_flops()
    if peak is None:
        return "unknown for this device until the first steps are done"
    share = config.global_batch_size / len(data.train)
    flops = training_flops(hf, config.global_batch_size * config.seq_length, sum(data.train.costs) * share)
    step = flops / (peak * EXPECTED_MFU * ranks)
    return f"about {step:.1f} s per step, {step * config.train_iters / 3600:.1f} hours at {EXPECTED_MFU:.0%} MFU"
