"""Training on several GPUs of one machine: layouts, long samples, checkpoints; floors, other libraries and predictions.

    RSFT_REAL_DATA=FOLDER python benchmarks/train_multi.py --output OUT --gpus 4 [--part 1] [--sections ...] [--small]
    ... --gpus 4 --one-rank 0      rank 0 by itself on one GPU, without exchanges (one_rank.py); part 4 needs it

Models have real shapes and random weights; packs of 16,384 tokens are filled with the real traces in RSFT_REAL_DATA,
longer ones with samples that are traces joined. A part takes less than 10 minutes: each of its sections runs in
processes of its own, for SECONDS at most, and is left out if less than that remains. A section writes
OUT/<section>.json and .log; a call ends with one table of all that was measured, beside what rsft_lib.training.advisor
predicts with the default rates and, after the section `rates`, with this machine's. --small tries everything with tiny
models, also on a CPU, where what needs Transformer Engine or Liger fails and is reported.
"""

import argparse
import dataclasses
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

import one_rank
import train_gpu
from model_menu import FIELDS, SHAPES
from train_gpu import LENGTH, MICRO_BATCHES, make_traces, measure, randomize, settings, usual_step

from rsft_lib.checkpoint import any_format
from rsft_lib.checkpoint.export import export
from rsft_lib.common.artifact import new_folder, read_manifest
from rsft_lib.common.device import device
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import StoreWriter, TokenStore
from rsft_lib.launch.job import ENVIRONMENT
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.training import measure_rates, rates
from rsft_lib.training.advisor import advise, name
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loop import update
from rsft_lib.training.memory import GIB, memory
from rsft_lib.training.saving import Saver
from rsft_lib.training.state import load
from rsft_lib.training.step_time import step_time

QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "max_position_embeddings": 2**18, "hidden_act": "silu", "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
MODELS = {name.removeprefix("r1-"): sizes for name, (kind, *sizes) in SHAPES.items() if kind == "qwen2"}
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SHORTER = 32  # with --small
LOW = {"moments": "bf16", "gradients": "bf16"}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}


class Section(NamedTuple):
    """One measurement."""

    part: int
    model: str
    run: Callable[[TrainConfig], dict]
    layout: dict
    length: int = LENGTH
    gpus: int = 0
    """0 for all."""
    packs: int = MICRO_BATCHES
    """Of a step, for each replica."""
    target: str = ""


def ours(config: TrainConfig, steps: int = 3, warmup: int = 2) -> dict:
    """The kit's training step."""
    train_gpu.WARMUP = warmup
    result = measure(config, steps)
    result.pop("load")
    return result


def attention_of_ranks(config: TrainConfig) -> dict:
    """Kernels of a layer's attention over the usual packs, and the efficiency of context parallelism for them."""
    seconds = {size: attention_seconds(config, size) for size in (1, 2, 4)}
    efficiency = {f"cp{size}": seconds[1] / (size * taken) for size, taken in seconds.items()}
    return {"ms": 1000 * seconds[1] / config.global_batch_size, **efficiency}


def attention_seconds(config: TrainConfig, size: int) -> float:
    """Seconds of a layer's attention, forward and backward, on one of `size` context-parallel ranks."""
    from gpu_floor import random

    from rsft_lib.model.attention import TEAttention, samples_of
    from rsft_lib.model.config import head_dim
    from rsft_lib.model.transformer_config import transformer_config

    hf = read_config(config.checkpoint)
    inner = TEAttention(transformer_config(hf, context_parallel_size=size), 1, None, "self").cuda()
    inner._exchange = lambda by_rank: by_rank
    data, width = PackedDataset(TokenStore(config.data), config.seq_length, 0), head_dim(hf)
    heads, groups, seconds = hf.num_attention_heads, hf.num_key_value_heads, 0.0
    for pack in usual_step(data, config.global_batch_size):
        ends = data.batch([pack])["cu_seqlens"].tolist()
        query, key, value = (random(ends[-1] // size, 1, n, width).requires_grad_() for n in (heads, groups, groups))
        samples, grad = samples_of(ends, "cuda"), random(ends[-1] // size, 1, heads * width)

        def both(query=query, key=key, value=value, samples=samples, grad=grad):
            inner(query, key, value, attention_bias=samples).backward(grad)

        seconds += kernel_seconds(both)
    return seconds


def kernel_seconds(function: Callable, repeats: int = 5) -> float:
    """Time of a call's kernels on the GPU, without the gaps between them."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / repeats / 1e6


def profiled(config: TrainConfig) -> dict:
    """ms of a micro-batch by kind of kernel; "exchange alone" has no other beside it. The longest are in the log."""
    data = PackedDataset(TokenStore(config.data), config.seq_length, 0)
    packs, loader = usual_step(data, config.global_batch_size), Loader(data, config)
    state = build_state(config, Path(config.checkpoint))
    randomize(state)
    for _ in range(2):
        update(state, loader, packs, packs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        update(state, loader, packs, packs)
        torch.cuda.synchronize()
    longest = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:40]
    for event in longest if torch.distributed.get_rank() == 0 else []:
        ms = event.self_device_time_total / 1000 / len(packs)
        print(f"{kind_of(event.key.lower()):10} {ms:7.2f} ms {event.count:6}  {event.key[:120]}")
    spans: dict[str, list] = {kind: [] for kind in (*KERNELS, "other")}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans[kind_of(event.name.lower())].append((event.time_range.start, event.time_range.end))
    everything = [span for some in spans.values() for span in some]
    busy, first, last = covered(everything), min(everything)[0], max(end for _, end in everything)
    without = covered([span for kind, some in spans.items() if kind != "exchange" for span in some])
    found = {kind: covered(some) for kind, some in spans.items()}
    found |= {"exchange alone": busy - without, "idle": last - first - busy, "all": last - first}
    return {kind: value / 1000 / len(packs) for kind, value in found.items()}


KERNELS = {  # kind -> parts of the names of kernels, the first that fits
    "exchange": ("nccl", "ptop", "userbuffers"),
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "products": ("gemm", "nvjet", "xmma", "cutlass"),
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, parts in KERNELS.items() if any(part in kernel for part in parts)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """The time in which at least one of the spans runs."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def exchanges(config: TrainConfig) -> dict:
    """GB/s that a rank sends in each exchange, by its MB; the settings of NCCL are those of the environment."""
    world, found = torch.distributed.get_world_size(), {}
    for megabytes in (8, 32, 128):
        whole = torch.empty(megabytes * 2**19 // world * world, dtype=torch.bfloat16, device=device())
        part, received = whole[: len(whole) // world], torch.empty_like(whole)
        sent = whole.nbytes * (world - 1) / world
        for exchange, call, times in (
            ("all-to-all", partial(torch.distributed.all_to_all_single, received, whole), 1),
            ("all-gather", partial(torch.distributed.all_gather_into_tensor, received, part), 1),
            ("reduce-scatter", partial(torch.distributed.reduce_scatter_tensor, received[: len(part)], whole), 1),
            ("all-reduce", partial(torch.distributed.all_reduce, whole), 2),
        ):
            found[f"{exchange} {megabytes}"] = times * sent / measure_rates.seconds_of(call, 0.1, times=20) / 1e9
    return found


def plain_megatron(config: TrainConfig) -> dict:
    from moe_gpu import megatron

    return megatron(config)


def fsdp2(config: TrainConfig, checkpointing: bool) -> dict:
    """transformers with Liger's kernels and torch's varlen attention, sharded by FSDP2; float32 states, fused AdamW."""
    from gpu_peers import _forward_backward, varlen
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    from moe_gpu import timed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    apply_liger_kernel_to_qwen2()
    ALL_ATTENTION_FUNCTIONS["varlen"] = varlen
    hf = read_config(config.checkpoint)
    hf._attn_implementation = "varlen"
    torch.set_default_device(torch.device("cuda", torch.cuda.current_device()))
    network = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).train()
    torch.set_default_device("cpu")
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in [*network.model.layers, network]:
        fully_shard(part, mp_policy=policy)
    torch.cuda.empty_cache()
    adam = torch.optim.AdamW(network.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[dict]) -> None:
        for number, batch in enumerate(batches, start=1):
            network.set_requires_gradient_sync(number == len(batches))
            _forward_backward(network, batch)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return timed(config, step)


def floor(config: TrainConfig) -> dict:
    """Products, attention and AdamW's traffic of a pack on one GPU, each by itself."""
    import gpu_floor

    gpu_floor.ranks = nullcontext  # there are process groups already
    found = gpu_floor.floor(Path(config.checkpoint), Path(config.data))
    return {"ms_per_micro_batch": found["total_ms"], "tokens_per_second": LENGTH / found["total_ms"] * 1000, **found}


def machine_rates(config: TrainConfig) -> dict:
    found = measure_rates.measure() if torch.cuda.is_available() else measure_rates.measure(512, 512, 0.1)
    return dataclasses.asdict(found)


def checkpoint(config: TrainConfig) -> dict:
    """Seconds that training waits for a save, of the steps after it, of the write, of a resume and of an export."""
    seconds: dict = {}
    folder, hf = Path(config.output).parent, Path(config.checkpoint) / "config.json"
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shutil.rmtree(config.output, ignore_errors=True) if rank == 0 else None

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        _together()
        began = time.perf_counter()
        yield
        _together()
        seconds.setdefault(what, []).append(time.perf_counter() - began)
        print(f"{what}: {seconds[what][-1]:.2f} s", flush=True)  # also if the section's time ends before it does

    state = build_state(config, Path(config.checkpoint))
    randomize(state)
    data = PackedDataset(TokenStore(config.data), config.seq_length, 0)
    packs, loader = usual_step(data, config.global_batch_size), Loader(data, config)
    saver = Saver(Path(config.output), hf, {}, iteration=0, size=0, timeout=500, keep_last=1, keep_every=0)
    for _ in range(2):
        update(state, loader, packs, packs)
    for _ in range(3):
        with timed("step"):
            update(state, loader, packs, packs)
    with timed("memory reserved"):
        saver.reserve(state)
    with timed("written"):
        state.iteration = 1
        with timed("waits"):
            saver.save(state, wait=False)
        for _ in range(3):
            with timed("step while writing"):
                update(state, loader, packs, packs)
        saver.finish()
    saved = Path(config.output) / "iter_0000001"
    sizes = {name: entry["bytes"] for name, entry in read_manifest(saved)["files"].items()}
    for what in ("resumed", "resumed with the files in memory"):
        with timed(what):
            load(state, saved)
    with timed("a quarter read, bare"):
        _read_files(sorted(saved.glob("*.distcp"))[rank :: 4 * world])
    if rank == 0:
        began = time.perf_counter()
        any_format.check(saved)
        seconds["weights verified"] = [time.perf_counter() - began]
        began = time.perf_counter()
        export(saved, folder / "tokenizer", folder / "exported", overwrite=True)
        seconds["exported"] = [time.perf_counter() - began]
        shutil.rmtree(config.output)
        shutil.rmtree(folder / "exported")
    _together()
    share = sum(sizes.values()) // world
    with timed("a quarter written, bare"):
        _write_bytes(folder / f"bytes{rank}", share // 4)
    return {"gb": sum(sizes.values()) / 1e9} | {what: statistics.median(times) for what, times in seconds.items()}


def _write_bytes(path: Path, count: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, count, 2**26):
            file.write(b"\0" * 2**26)
        os.fsync(file.fileno())
    path.unlink()


def _read_files(paths: list[Path]) -> None:
    """Read files around the page cache, as many at a time as a resumed run."""

    def read(path: Path) -> None:
        file, buffer = os.open(path, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 2**24)
        while os.readv(file, [buffer]) == len(buffer):
            pass
        os.close(file)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read, paths))


def _together() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    torch.distributed.barrier()


def run(part: int, model: str, target: str = "", gpus: int = 0, length: int = LENGTH, **layout) -> Section:
    """A section of `ours`; few packs and steps of long samples, which take seconds each."""
    packs, steps = {2**12: (8, 3), LENGTH: (MICRO_BATCHES, 3), 2**16: (2, 2), 2**17: (1, 1)}.get(length, (1, 1))
    work = partial(ours, steps=steps, warmup=2 if length <= 2**16 else 1)
    return Section(part, model, work, layout, length, gpus, packs, target)


LONG = {"length": 2**16, "packs": 2, "gpus": 1}
SECTIONS = {
    "attention-1.5b": Section(0, "1.5b", attention_of_ranks, {}, gpus=1),
    "attention-7b": Section(0, "7b", attention_of_ranks, {}, gpus=1),
    "attention-1.5b-64k": Section(0, "1.5b", attention_of_ranks, {}, **LONG),
    "attention-7b-64k": Section(0, "7b", attention_of_ranks, {}, **LONG),
    "exchanges": Section(0, "1.5b", exchanges, {}),
    "profile-1.5b-tp2": Section(0, "1.5b", profiled, TP2),
    "profile-1.5b-tp2-2-packs": Section(0, "1.5b", profiled, {**TP2, "micro_batch_size": 2}),
    "profile-1.5b-tp2-overlap": Section(0, "1.5b", profiled, {**TP2, "tensor_overlap": True}),
    "profile-7b-tp2": Section(0, "7b", profiled, TP2),
    "profile-7b-tp2-overlap": Section(0, "7b", profiled, {**TP2, "tensor_overlap": True}),
    "profile-7b-cp2": Section(0, "7b", profiled, {"context_parallel": 2, **LOW}),
    "rates": Section(1, "1.5b", machine_rates, {}),
    "floor-1.5b": Section(1, "1.5b", floor, {}, gpus=1),
    "1.5b-1gpu": run(1, "1.5b", "MFU 0.52, 53 GiB", gpus=1),
    "1.5b-replicas": run(1, "1.5b", ">= 0.99 of 1gpu"),
    "1.5b-tp2": run(1, "1.5b", ">= 0.85 of 1gpu", **TP2),
    "1.5b-cp4": run(1, "1.5b", context_parallel=4),
    "1.5b-cp2": run(1, "1.5b", context_parallel=2),
    "1.5b-4k": run(1, "1.5b", gpus=1, length=2**12),
    "1.5b-4k-4-packs": run(1, "1.5b", gpus=1, length=2**12, micro_batch_size=4),
    "1.5b-tp2-2-packs": run(1, "1.5b", ">= 0.85 of 1gpu", **TP2, micro_batch_size=2),
    "1.5b-tp2-2-packs-overlap": run(1, "1.5b", ">= 0.85 of 1gpu", **TP2, micro_batch_size=2, tensor_overlap=True),
    "1.5b-tp2-overlap": run(1, "1.5b", ">= 0.85 of 1gpu", **TP2, tensor_overlap=True),
    "1.5b-fp8": run(1, "1.5b", gpus=1, precision="fp8"),
    "1.5b-fsdp2-liger": Section(1, "1.5b", partial(fsdp2, checkpointing=False), {}),
    "1.5b-fsdp2-liger-checkpointing": Section(1, "1.5b", partial(fsdp2, checkpointing=True), {}),
    "1.5b-megatron": Section(1, "1.5b", plain_megatron, {"backend": "te"}),
    "floor-7b": Section(2, "7b", floor, {}, gpus=1),
    "7b-cp4": run(2, "7b", "MFU 0.56", context_parallel=4, **LOW),
    "7b-cp2": run(2, "7b", "MFU 0.56", context_parallel=2, **LOW),
    "7b-replicas": run(2, "7b", "MFU 0.56", **SELECTIVE, **LOW),
    "7b-replicas-16-layers": run(2, "7b", "MFU 0.56", **SELECTIVE, recompute_layers=16, **LOW),
    "7b-replicas-all-kept": run(2, "7b", "MFU 0.56", **LOW),
    "7b-replicas-fp8": run(2, "7b", "MFU 0.66", precision="fp8", **SELECTIVE, **LOW),
    "7b-1gpu": run(2, "7b", "MFU 0.56", gpus=1, **SELECTIVE, **LOW),
    "7b-1gpu-fp8": run(2, "7b", "MFU 0.66", gpus=1, precision="fp8", **SELECTIVE, **LOW),
    "7b-tp2": run(2, "7b", ">= 0.90 of a replica", **TP2),
    "7b-tp2-overlap": run(2, "7b", ">= 0.90 of replicas", **TP2, tensor_overlap=True),
    "7b-shipped": run(2, "7b", **TP2, **SELECTIVE),
    "7b-fsdp2-liger-checkpointing": Section(2, "7b", partial(fsdp2, checkpointing=True), {}),
    "7b-megatron": Section(2, "7b", plain_megatron, {"backend": "te", **FULL, **LOW}),
    "7b-fsdp2-liger": Section(2, "7b", partial(fsdp2, checkpointing=False), {}),
    "14b-cp8": run(4, "14b", gpus=16, context_parallel=8, **LOW),
    "14b-pp2-cp4": run(4, "14b", gpus=8, pipeline_parallel=2, context_parallel=4, **LOW),
    "32b-tp2-pp2-cp4": run(4, "32b", gpus=16, pipeline_parallel=2, context_parallel=4, **TP2, **LOW),
    "checkpoint-1.5b": Section(3, "1.5b", checkpoint, {}, gpus=1, target="waits 1 s, resumed 20 s"),
    "checkpoint-7b": Section(
        3, "7b", checkpoint, {**FULL, "gradients": "bf16"}, packs=2, target="waits 2 s, exported 40 s"
    ),
    "1.5b-64k-cp4": run(3, "1.5b", "MFU 0.48", length=2**16, context_parallel=4),
    "1.5b-64k-cp2": run(3, "1.5b", "MFU 0.48", length=2**16, context_parallel=2, **SELECTIVE),
    "1.5b-64k-1gpu": run(3, "1.5b", "MFU 0.48", gpus=1, length=2**16, **SELECTIVE, **LOW),
    "1.5b-128k-cp4": run(3, "1.5b", "MFU 0.45", length=2**17, context_parallel=4, **SELECTIVE),
    "1.5b-128k-cp2": run(3, "1.5b", "MFU 0.45", length=2**17, context_parallel=2, **SELECTIVE),
    "1.5b-128k-1gpu": run(3, "1.5b", "MFU 0.45", gpus=1, length=2**17, **SELECTIVE, **LOW),
    "1.5b-128k-1gpu-5-full": run(3, "1.5b", "MFU 0.45", gpus=1, length=2**17, **FULL, recompute_layers=5, **LOW),
    "1.5b-128k-replicas": run(3, "1.5b", "MFU 0.45", length=2**17, **SELECTIVE, **LOW),
    "1.5b-256k-1gpu": run(3, "1.5b", "fits", gpus=1, length=2**18, **FULL, **LOW),
}
ALONE = (ours, attention_of_ranks)  # what is meaningful without exchanges
SLOW = {key: 130 for key in SECTIONS if key.startswith(("7b", "14b", "32b"))}  # seconds; all others SECONDS
SLOW |= {"checkpoint-7b": 400, "1.5b-256k-1gpu": 200}


def sections(small: bool) -> dict[str, Section]:
    if not small:
        return SECTIONS
    return {
        key: one._replace(length=one.length // SHORTER, packs=one.layout.get("micro_batch_size", 1))
        for key, one in SECTIONS.items()
    }


def inputs_of(section: Section, output: Path, small: bool) -> tuple[Path, Path]:
    """(model folder, data folder) of a section; the data is made unless it is there."""
    inputs = output / "inputs"
    model = inputs / (section.model + ("-small" if small else ""))
    model.mkdir(parents=True, exist_ok=True)
    shape = dict(zip(FIELDS, MODELS[section.model], strict=True))
    (model / "config.json").write_text(json.dumps(QWEN2 | shape | (SMALL if small else {})))
    if section.length == LENGTH:
        return model, inputs / "traces"
    data = inputs / f"joined-{section.length}"
    if not data.exists():
        _join_traces(inputs / "traces", data, section.length + 1)
    return model, data


def _join_traces(traces: Path, data: Path, length: int) -> None:
    tokens, mask = (np.fromfile(traces / name, kind) for name, kind in NAMES)
    with new_folder(data, {"made_by": "tokenize"}) as folder:
        writer = StoreWriter(folder)
        for start in range(0, len(tokens) - length, length):
            writer.add(tokens[start : start + length], mask[start : start + length])
        writer.close()


NAMES = (("text_document.bin", np.int32), ("loss_mask.bin", np.uint8))


def config_of(section: Section, model: Path, data: Path, gpus: int) -> TrainConfig:
    layout = section.layout
    sizes = (layout.get(f"{kind}_parallel", 1) for kind in ("tensor", "pipeline", "context"))
    replicas = (section.gpus or gpus) // int(np.prod(list(sizes))) or 1
    folder = model.parent
    return settings(
        folder, checkpoint=str(model), data=str(data), output=str(folder / "run"), seq_length=section.length,
        global_batch_size=section.packs * replicas, **layout,
    )  # fmt: skip


def run_here(key: str, section: Section, config: TrainConfig, arguments: argparse.Namespace) -> None:
    """Run a section as a rank; the first writes the result, or the error."""
    gpus = section.gpus or arguments.gpus
    first = min(arguments.one_rank or 0, gpus - 1)
    if arguments.one_rank is not None:
        one_rank.become(first, gpus)
    if not torch.cuda.is_available():  # the script is being tried
        for unknown in ("reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
            setattr(torch.cuda, unknown, lambda: 0)
    with ranks(
        config.tensor_parallel, config.pipeline_parallel, context_parallel_size=config.context_parallel
    ):  # fmt: skip
        world = torch.distributed.get_world_size()
        try:
            result = section.run(config)
            result["mfu"] = result["mfu"] / world if "mfu" in result else None
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if torch.distributed.get_rank() == first:
            (arguments.output / f"{key}.json").write_text(
                json.dumps(result | {"gpus": world, "alone": arguments.one_rank is not None}, indent=1)
            )
        sys.stdout.flush()
        os._exit("error" in result)  # without cleanup, which may hang after an error


def run_section(key: str, arguments: argparse.Namespace, limit: float) -> None:
    gpus = 1 if arguments.one_rank is not None else SECTIONS[key].gpus or arguments.gpus
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", __file__]
    command += ["--output", str(arguments.output), "--gpus", str(arguments.gpus), "--here", key]
    command += [] if arguments.one_rank is None else ["--one-rank", str(arguments.one_rank)]
    began = time.time()
    (arguments.output / f"{key}.json").unlink(missing_ok=True)
    with (arguments.output / f"{key}.log").open("w") as log:
        process = subprocess.Popen(
            command + ["--small"] * arguments.small, stdout=log, stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ}, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which have sessions of their own
            process.wait()
    print(f"{key}: {time.time() - began:.0f} s", flush=True)


def table(output: Path, gpus: int, small: bool) -> str:
    """What was measured beside what was predicted; tokens/s of one GPU, and the prediction over it."""
    file = output / "rates.json"
    known = json.loads(file.read_text()) if file.exists() else {"error": "not measured"}
    file = None if "error" in known else _rates_of(known, output)
    columns = ("tokens/s/GPU", "MFU", "GiB", "predicted", "own rates", "GiB pred.")
    lines = [f"{'':32}" + "".join(f"{column:>13}" for column in columns) + "  target"]
    for key, section in sections(small).items():
        if not (output / f"{key}.json").exists():
            if (output / f"{key}.log").exists():
                lines.append(f"{key:32}  no result: see {key}.log")
            continue
        result = json.loads((output / f"{key}.json").read_text())
        if "tokens_per_second" not in result:
            shown = {
                k: round(v, 2) if isinstance(v, float) else v for k, v in result.items() if k not in ("gpus", "mfu")
            }
            lines.append(f"{key:32}  {json.dumps(shown)[:400]}  {section.target}")
            continue
        cells = [f"{result['tokens_per_second'] / result['gpus']:13,.0f}"]
        cells += [
            f"{result[k]:13.{digits}f}" if result.get(k) else f"{'':13}" for k, digits in (("mfu", 3), ("peak_gib", 1))
        ]
        if isinstance(section.run, partial) and section.run.func is ours:
            cells += predictions(section, result, output, gpus, small, file)
        lines.append(f"{key:32}{''.join(cells)}  {section.target}")
    return "\n".join([*lines, *best(output, gpus, small, file)])


def _rates_of(known: dict, output: Path) -> Path:
    (output / "rates").mkdir(exist_ok=True)
    path = output / "rates" / "rates.json"
    path.write_text(json.dumps({name: known[name] for name in rates.Rates.__dataclass_fields__}))
    return path


def predictions(section: Section, result: dict, output: Path, gpus: int, small: bool, file: Path | None) -> list[str]:
    model, data = inputs_of(section, output, small)
    config, hf = config_of(section, model, data, gpus), read_config(model)
    sample = PackedDataset(TokenStore(data), section.length, 0).sample_length
    tokens, cells = config.global_batch_size * section.length, []
    for known in (rates.H100, rates.read_rates(file) if file else None):
        if known is None:
            cells.append(f"{'':13}")
            continue
        ratio = tokens / step_time(config, hf, result["gpus"], known, sample).total / result["tokens_per_second"]
        cells.append(f"{ratio - 1:+13.1%}")
    if not result["peak_gib"]:
        return cells
    return [*cells, f"{memory(config, hf, result['gpus']).total / GIB / result['peak_gib'] - 1:+13.1%}"]


def best(output: Path, gpus: int, small: bool, file: Path | None) -> list[str]:
    """The layouts that the advisor would choose."""
    lines = []
    for model, length in (("1.5b", LENGTH), ("7b", LENGTH), ("1.5b", 2**16), ("1.5b", 2**17)):
        section = run(0, model, length=length)._replace(length=length // (SHORTER if small else 1))
        folder, data = inputs_of(section, output, small)
        config = dataclasses.replace(config_of(section, folder, data, gpus), global_batch_size=MICRO_BATCHES * gpus)
        sample = PackedDataset(TokenStore(data), section.length, 0).sample_length
        try:
            chosen, *_ = advise(
                config, read_config(folder), gpus, rates.read_rates(file) if file else rates.H100, sample
            )
        except ValueError as error:
            lines.append(f"advised for {model} at {length:,}: {error}")
            continue
        rate = MICRO_BATCHES * section.length / chosen.time.total
        lines.append(f"advised for {model} at {length:,}: {name(chosen)}, {rate:,.0f} tokens/s/GPU")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--one-rank", type=int, metavar="RANK", help="only this rank, on one GPU, without exchanges")
    parser.add_argument("--part", type=int, choices=[1, 2, 3, 4], help="sections of one call; by default 1 to 3")
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS))
    parser.add_argument("--seconds", type=int, default=85, help="time limit of a section")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of the call; 0 for none")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--here", choices=list(SECTIONS), help="run in this process")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    if arguments.here:
        section = sections(arguments.small)[arguments.here]
        model, data = inputs_of(section, arguments.output, arguments.small)
        run_here(arguments.here, section, config_of(section, model, data, arguments.gpus), arguments)
    chosen = arguments.sections or [
        k for k, s in SECTIONS.items() if s.part == arguments.part or (not arguments.part and 0 < s.part < 4)
    ]
    began = time.time()
    (arguments.output / "inputs").mkdir(parents=True, exist_ok=True)
    make_traces(arguments.output / "inputs")
    for section in sections(arguments.small).values():
        inputs_of(section, arguments.output, arguments.small)  # once, not on every rank
    if arguments.one_rank is not None:
        chosen = [key for key in chosen if getattr(SECTIONS[key].run, "func", SECTIONS[key].run) in ALONE]
    for key in chosen:
        limit = SLOW.get(key, arguments.seconds)
        if arguments.minutes and time.time() - began + limit > 60 * arguments.minutes:
            print(f"{key}: not run, less than {limit} s remain", flush=True)
            continue
        run_section(key, arguments, limit)
    print(table(arguments.output, arguments.gpus, arguments.small))


if __name__ == "__main__":
    main()
