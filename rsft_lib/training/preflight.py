"""What a run will need, in words, before it starts: memory, disk, steps, time."""

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
import torch
from transformers import PretrainedConfig

from rsft_lib.common.device import gpu
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.model.config import check_layout, read_config
from rsft_lib.model.weight_map import expert_count
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.datasets import Datasets, open_datasets
from rsft_lib.training.flops import matmul_parameters, parameters, peak_flops
from rsft_lib.training.memory import GIB, memory, weight_bytes
from rsft_lib.training.metrics import scan_metrics
from rsft_lib.training.rates import rates_file, read_rates
from rsft_lib.training.step_time import step_time

MEASURED = 100  # last steps of a run whose time is expected of the next


def preflight(config: TrainConfig, nproc: int, nodes: int = 1) -> str:
    """Describe a run on `nproc` ranks of each of `nodes` machines like this one.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: the settings are inconsistent, or do not fit the model or the data.
    """
    config.data_parallel(nproc * nodes)
    hf = read_config(require_path(config.checkpoint, "checkpoint"))
    return describe(config, hf, open_datasets(config), nproc, nodes)


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
    if expert_count(hf) and config.recompute == "full" and config.recompute_layers:
        raise ValueError(
            f"recompute_layers={config.recompute_layers} with recompute 'full' is not possible for a model with "
            "experts: megatron-core 0.16 would count padding as tokens in the other layers. Set recompute_layers to 0"
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


def describe(config: TrainConfig, hf: PretrainedConfig, data: Datasets, nproc: int, nodes: int) -> str:
    """The text of `preflight`, which also starts the log of a run."""
    ranks = nproc * nodes
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
        "memory": _memory_line(config, hf, nproc, nodes),
        "step": f"{config.global_batch_size * config.seq_length:,} tokens in {config.global_batch_size} packs",
        "epoch": f"{per_epoch:,.1f} steps of {len(data.train):,} packs",
        "run": f"{config.train_iters:,} steps, {config.train_iters / per_epoch:,.1f} epochs{overrides}",
        "checkpoint": _checkpoint_line(config, hf),
        "saving": _saving_line(config, hf),
        "time": _time_line(config, hf, data, nproc, nodes),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


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


def _memory_line(config: TrainConfig, hf: PretrainedConfig, nproc: int, nodes: int) -> str:
    need = memory(config, hf, nproc * nodes)
    parts = ", ".join(f"{name} {_size(getattr(need, name))}" for name in need.__dataclass_fields__)
    if device := gpu():
        available, what = device[1], "this GPU has"
    else:
        available, what = psutil.virtual_memory().total / nproc, "each rank's share of this machine is"
    fits = (
        ""
        if need.total < 0.95 * available
        else "  TOO LITTLE: set layout to 'auto', or see recompute, moments, gradients and the *_parallel settings"
    )
    return f"about {_size(need.total)} per rank ({parts}); {what} {_size(available)}{fits}"


def checkpoint_bytes(config: TrainConfig, hf: PretrainedConfig) -> int:
    """Bytes of a checkpoint: weights, float32 master weights, and moments in their dtype."""
    return parameters(hf) * (weight_bytes(config) + 4 + 2 * (2 if config.moments == "bf16" else 4))


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


def _size(bytes_: float) -> str:
    return f"{bytes_ / GIB:,.1f} GiB" if bytes_ >= GIB else f"{bytes_ / 2**20:,.1f} MiB"


def _first_existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _time_line(config: TrainConfig, hf: PretrainedConfig, data: Datasets, nproc: int, nodes: int) -> str:
    if done := scan_metrics(resolve(config.output)).records[-MEASURED:]:
        step, left = median(record["seconds"] for record in done), max(0, config.train_iters - done[-1]["iteration"])
        return f"{step:.3g} s per step as measured before; {left:,} more steps take {step * left / 60:,.1f} minutes"
    if peak_flops() is None and not rates_file().exists():
        return "unknown for this device until the first steps are done"
    try:
        rates = replace(read_rates(), gpus_per_node=nproc)
    except ValueError as error:  # a run does not need them
        return f"unknown: {error}"
    step = step_time(config, hf, nproc * nodes, rates, data.train.sample_length).total
    return f"about {step:.1f} s per step, {step * config.train_iters / 3600:.1f} hours; rates: {rates.source}"
