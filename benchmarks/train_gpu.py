"""Training on one GPU: speed, memory and learning, compared with a lower bound (floor) and with other libraries.

    RSFT_REAL_DATA=FOLDER python benchmarks/train_gpu.py --output OUT [--sections floor bf16 ...] [--before TREE]

The model is DeepSeek-R1-Distill-Qwen-1.5B's shape with random weights; packs of 16,384 tokens are filled with the real
traces in RSFT_REAL_DATA; an optimizer step has 8 micro-batches. Each section runs in its own process and writes
OUT/<section>.json, from which the final table is made. NOTES.md records the experiments. With --before, bf16 and the
presets also run with the code of TREE, a checkout of another commit, as before-<section>.
"""

import argparse
import gc
import gzip
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from rsft_lib.chain.project_file import MEMORY
from rsft_lib.checkpoint import any_format
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.launch.job import ENVIRONMENT
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.tokenizer.patch import patch_tokenizer
from rsft_lib.training import expert_stats
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.flops import training_flops
from rsft_lib.training.loop import update
from rsft_lib.training.loss_stats import trained_tokens, weight_sum
from rsft_lib.training.saving import Saver
from rsft_lib.training.state import TrainState, load

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

LENGTH, MICRO_BATCHES, PEAK, GIB = 16_384, 8, 989e12, 2**30
WARMUP, STEPS = 2, 4


def make_inputs(folder: Path) -> None:
    """Tokenize the real files, unless that was done before.

    traces: long answers. pairs: the long answer of each problem, and the short one extracted from it. hybrid: the long
    answers and the short ones of GSM8K. mix: the same, up to 8,192 tokens.
    """
    if (folder / "ready").exists():
        return
    real = Path(os.environ["RSFT_REAL_DATA"])
    model = real / "tokenizers" / "r1-distill-qwen"
    make_traces(folder)
    (folder / "short.jsonl").write_bytes((real / "data" / "short_gsm8k_train.jsonl").read_bytes())
    build_hybrid(folder / "long.jsonl", folder / "short.jsonl", folder / "both", held_out=0.01, seed=1)
    build_hybrid(folder / "long.jsonl", "", folder / "cut", held_out=0, seed=1)
    tokenize(folder / "cut" / "train.jsonl", folder / "tokenizer", folder / "pairs", max_length=LENGTH + 1)
    tokenize(folder / "both" / "train.jsonl", folder / "tokenizer", folder / "hybrid", max_length=LENGTH + 1)
    tokenize(folder / "both" / "train.jsonl", folder / "tokenizer", folder / "mix", max_length=8193)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    (folder / "ready").touch()


def make_traces(folder: Path) -> None:
    """Tokenize the long answers, unless that was done before."""
    real = Path(os.environ["RSFT_REAL_DATA"])
    patch_tokenizer(real / "tokenizers" / "r1-distill-qwen", folder / "tokenizer", {"<|quad_start|>": "<short>"})
    if not (folder / "long.jsonl").exists():
        with gzip.open(real / "data" / "long_planbench_r1.jsonl.gz", "rb") as file:
            (folder / "long.jsonl").write_bytes(file.read())
    tokenize(folder / "long.jsonl", folder / "tokenizer", folder / "traces", max_length=LENGTH + 1)


def settings(folder: Path, **changes) -> TrainConfig:
    given = {"checkpoint": str(folder / "model"), "data": str(folder / "traces"), "output": str(folder / "run")}
    return TrainConfig(**{**given, "global_batch_size": MICRO_BATCHES, "warmup_fraction": 0.0, **changes})


@torch.no_grad()
def randomize(state: TrainState, seed: int = 0) -> None:
    """Initialise the weights: norms 1, biases 0, all others normal with standard deviation 0.02."""
    torch.manual_seed(seed)
    for chunk in state.chunks:
        for name, weight in chunk.named_parameters():
            if "norm" in name:
                weight.fill_(1.0)
            elif name.endswith("bias"):
                weight.zero_()
            else:
                weight.normal_(0.0, 0.02)


def measure(config: TrainConfig, steps: int = STEPS, single: bool = False) -> dict:
    """Median step time and peak memory of a training with `config`, always on the packs of `usual_step`.

    `epoch_s` extrapolates the time to all packs, whose costs differ little.

    Args:
        single: attend over each pack as one sample, padding included, as without packing.
    """
    hf = read_config(config.checkpoint)
    data = PackedDataset(TokenStore(config.data), config.seq_length, 0, packing=config.packing)
    if single:
        data._parts = lambda index: [tuple(map(_joined, zip(*PackedDataset._parts(data, index), strict=True)))]
    torch.cuda.reset_peak_memory_stats()
    state = build_state(config, Path(config.checkpoint))
    randomize(state)
    gc.freeze()  # as the training loop does
    packs, loader = usual_step(data, config.global_batch_size), Loader(data, config)
    seconds, rates, losses, trained = [], [], [], []
    for _ in range(WARMUP + steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        done = update(state, loader, packs, packs)
        torch.cuda.synchronize()
        counts = done.counts
        seconds.append(time.perf_counter() - began)
        squares = config.seq_length**2 * len(packs) if single else sum(map(data.cost, packs))
        rates.append(training_flops(hf, config.global_batch_size * config.seq_length, squares) / seconds[-1])
        losses.append(counts[0] / weight_sum(counts))
        trained.append(trained_tokens(counts) / seconds[-1])
        state.scheduler.step(increment=1)
    step = statistics.median(seconds[WARMUP:])
    return {
        "ms_per_micro_batch": 1000 * step / len(packs),
        "epoch_s": len(data) * step / len(packs),
        "spread_ms": 1000 * (max(seconds[WARMUP:]) - min(seconds[WARMUP:])) / len(packs),
        "tokens_per_second": config.global_batch_size * config.seq_length / step,
        "trained_tokens_per_second": statistics.median(trained[WARMUP:]),
        "mfu": statistics.median(rates[WARMUP:]) / PEAK,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "losses": losses,
        **expert_stats.metrics(done.load),
        "load": done.load if done.load is None else done.load.tolist(),
    }


def _joined(column):
    import numpy

    return numpy.concatenate(column)


def usual_step(data: PackedDataset, size: int = MICRO_BATCHES) -> list[int]:
    """The packs of the step whose attention cost is closest to the mean; every section is timed on these."""
    steps = [data.step(number, size) for number in range(len(data) // size)]
    mean = sum(map(data.cost, range(len(data)))) / len(data) * size
    return min(steps, key=lambda packs: abs(sum(map(data.cost, packs)) - mean))


def ours(memory: str = "", **changes):
    def section(folder: Path, output: Path) -> dict:
        with ranks():
            return measure(settings(folder, **{**MEMORY[memory], **changes}))

    return section


def rent(name: str, **changes):
    """bf16 with a part of the kit replaced by that of a library."""

    def section(folder: Path, output: Path) -> dict:
        import gpu_rent

        with ranks():
            return gpu_rent.with_parts(lambda: measure(settings(folder, **changes)), getattr(gpu_rent, name))

    return section


def resumes(name: str | None, **changes):
    """Whether a two-layer model resumes bit for bit from a checkpoint, optionally with a part of the kit replaced."""

    def section(folder: Path, output: Path) -> dict:
        import gpu_rent

        small = folder / "two-layers"
        small.mkdir(exist_ok=True)
        config = json.loads((folder / "model" / "config.json").read_text())
        config |= {"num_hidden_layers": 2, "layer_types": config.get("layer_types", ["full_attention"] * 2)[:2]}
        (small / "config.json").write_text(json.dumps(config))
        run = settings(folder, checkpoint=str(small), global_batch_size=2, **changes)
        data = PackedDataset(TokenStore(run.data), run.seq_length, 0)
        with ranks():
            parts = getattr(gpu_rent, name) if name else {}
            return gpu_rent.with_parts(lambda: gpu_rent.resumed(run, randomize, data), parts)

    return section


def padded(data: str):
    """Every sample padded to 16,384, with attention over the padding, as in the original code."""

    def section(folder: Path, output: Path) -> dict:
        with ranks():
            return measure(settings(folder, data=str(folder / data), packing=False), steps=2, single=True)

    return section


def packed(data: str):
    def section(folder: Path, output: Path) -> dict:
        with ranks():
            return measure(settings(folder, data=str(folder / data)), steps=2)

    return section


def floor(folder: Path, output: Path) -> dict:
    from gpu_floor import floor

    return floor(folder / "model", folder / "traces")


def head(folder: Path, output: Path) -> dict:
    from gpu_floor import loss_heads

    return loss_heads(folder / "model")


def profile(folder: Path, output: Path) -> dict:
    """Profile one step by GPU kernel, in OUT/profile.txt."""
    config = settings(folder)
    with ranks():
        data = PackedDataset(TokenStore(config.data), config.seq_length, 0)
        state = build_state(config, Path(config.checkpoint))
        randomize(state)
        packs, loader = usual_step(data), Loader(data, config)

        update(state, loader, packs, packs)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profiler:
            update(state, loader, packs, packs)
            torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    lines = [
        f"{event.self_device_time_total / 1000 / MICRO_BATCHES:9.3f} ms {event.count:6d}  {event.key[:150]}"
        for event in kernels[:60]
    ]
    (output / "profile.txt").write_text("\n".join(lines) + "\n")
    return {"gpu_ms_per_micro_batch": sum(event.self_device_time_total for event in kernels) / 1000 / MICRO_BATCHES}


def checkpoint(folder: Path, output: Path) -> dict:
    """Seconds to save and resume a checkpoint, compared with bare disk writes.

    Training blocks for the whole write, or with `async_save` until the tensors are copied.
    """
    run, seconds = folder / "run", {}
    run.mkdir(parents=True, exist_ok=True)
    config = settings(folder)

    @contextmanager
    def timed(what: str):
        began = time.perf_counter()
        yield
        torch.distributed.barrier()
        seconds[what] = time.perf_counter() - began

    with ranks():
        state = build_state(config, Path(config.checkpoint))
        randomize(state)
        state.iteration = 1
        hf = folder / "model" / "config.json"
        saver = Saver(run, hf, {}, iteration=0, size=0, timeout=600, keep_last=1, keep_every=0)
        with timed("memory_reserved"):
            saver.reserve(state)
        with timed("saved"):
            with timed("saved_until_copied"):
                saver.save(state, wait=False)
            saver.finish()
        (saved,) = run.glob("iter_*")
        gigabytes = sum(path.stat().st_size for path in saved.iterdir()) / 1e9
        with timed("resumed"):  # hashes are verified meanwhile
            load(state, saved)
        with timed("weights_verified"):
            any_format.check(saved)
        shutil.rmtree(run)
        run.mkdir()
        with timed("bare_bytes"), (run / "bytes").open("wb") as file:
            for _ in range(round(gigabytes * 1e9 / 2**26)):
                file.write(b"\0" * 2**26)
            os.fsync(file.fileno())
        shutil.rmtree(run)
    return {"gigabytes": gigabytes, **seconds}


def liger(checkpointing: bool):
    def section(folder: Path, output: Path) -> dict:
        from gpu_peers import measure_liger

        return measure_liger(folder / "model", folder / "traces", checkpointing, MICRO_BATCHES)

    return section


def agreement(folder: Path, output: Path) -> dict:
    from gpu_peers import agreement

    return agreement(folder / "model", folder / "mix")


def learning(kind: str):
    def section(folder: Path, output: Path) -> dict:
        from gpu_learning import learn

        return learn(kind, folder, output)

    return section


SECTIONS = {
    "floor": floor,
    "head": head,
    "profile": profile,
    "bf16": ours(),
    "saving": ours("saving"),
    "smallest": ours("smallest"),
    "fp8-delayed": ours(precision="fp8", fp8_recipe="delayed"),
    "fp8-tensorwise": ours(precision="fp8", fp8_recipe="tensorwise"),
    "fp8-blockwise": ours(precision="fp8", fp8_recipe="blockwise"),
    "torch": ours(backend="torch"),
    "bf16-moments": ours(moments="bf16"),
    "fused-adam": rent("FUSED_ADAM"),
    "fused-adam-moments": rent("FUSED_ADAM", moments="bf16"),
    "resume": resumes(None),
    "fused-adam-resume": resumes("FUSED_ADAM"),
    "fused-adam-resume-moments": resumes("FUSED_ADAM", moments="bf16"),
    "padded": padded("traces"),
    "pairs": packed("pairs"),
    "pairs-padded": padded("pairs"),
    "hybrid": packed("hybrid"),
    "hybrid-padded": padded("hybrid"),
    "checkpoint": checkpoint,
    "liger": liger(checkpointing=False),
    "liger-checkpointing": liger(checkpointing=True),
    "agreement": agreement,
    "learn-ours": learning("ours"),
    "learn-fp8-tensorwise": learning("fp8-tensorwise"),
    "learn-fp8-delayed": learning("fp8-delayed"),
    "learn-transformers": learning("transformers"),
}
BEFORE = "before-"
COMPARED = ("bf16", "saving", "smallest", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise")


def start_section(name: str, inputs: Path, output: Path, before: Path | None) -> subprocess.Popen:
    """Start a section in its own process, so that GPU memory is freed; after its imports it waits for a line."""
    script, environment = Path(__file__), {**ENVIRONMENT, **os.environ}
    if name.startswith(BEFORE):
        script = before.resolve() / "benchmarks" / "train_gpu.py"
        environment["PYTHONPATH"] = f"{before.resolve()}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    given = ["--output", str(output), "--inputs", str(inputs), "--sections", name.removeprefix(BEFORE), "--here"]
    command = [sys.executable, str(script), *given]
    with (output / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_sections(names: list[str], inputs: Path, output: Path, before: Path | None) -> None:
    """Run sections one after the other, while the process of the next one does its imports."""
    places = {name: output / "before" if name.startswith(BEFORE) else output for name in names}
    for place in places.values():
        place.mkdir(exist_ok=True)
    upcoming = start_section(names[0], inputs, places[names[0]], before)
    for name, following in zip(names, [*names[1:], None], strict=True):
        process, began = upcoming, time.time()
        upcoming = start_section(following, inputs, places[following], before) if following else None
        process.communicate(b"go\n")
        print(f"{name}: {time.time() - began:.0f} s{'  FAILED' if process.returncode else ''}", flush=True)


def table(output: Path) -> str:
    """The results side by side."""
    read = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    read |= {BEFORE + path.stem: json.loads(path.read_text()) for path in output.glob("before/*.json")}
    floor = read.get("floor", {}).get("total_ms", math.nan)
    columns = ("ms", "/floor", "MFU", "GiB", "tokens/s", "trained/s", "epoch s")
    lines = [" " * 20 + "".join(f"{name:>10}" for name in columns)]
    for name, result in read.items():
        if "ms_per_micro_batch" in result:
            ms = result["ms_per_micro_batch"]
            lines.append(
                f"{name:20}{ms:10.1f}{ms / floor:10.3f}{result['mfu']:10.3f}{result['peak_gib']:10.1f}"
                f"{result['tokens_per_second']:10,.0f}{result['trained_tokens_per_second']:10,.0f}"
                f"{result.get('epoch_s', math.nan):10.0f}"
            )
        else:
            scalars = {k: v for k, v in result.items() if not isinstance(v, list)}
            lines.append(f"{name:20}{json.dumps(scalars)[:1500]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--inputs", type=Path, help="folder for tokenized inputs; in OUTPUT by default")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--before", type=Path, metavar="TREE", help="a checkout of another commit, to compare with")
    parser.add_argument("--here", action="store_true", help="run in this process, after a line of input")
    arguments = parser.parse_args()
    inputs = (arguments.inputs or arguments.output / "inputs").resolve()
    inputs.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    make_inputs(inputs)
    output = arguments.output.resolve()
    if arguments.here:
        sys.stdin.readline()
        for name in arguments.sections:
            (output / f"{name}.json").write_text(json.dumps(SECTIONS[name](inputs, output), indent=1))
    else:
        names = arguments.sections
        if arguments.before:
            names = [each for name in names for each in (name, BEFORE + name) if each in SECTIONS or name in COMPARED]
        run_sections(names, inputs, output, arguments.before)
        print(table(output))


if __name__ == "__main__":
    main()
