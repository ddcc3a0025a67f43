"""Layouts for a model, a sequence length and a number of GPUs, with predicted memory and step time, best first.

    python -m rsft_lib.training.advisor MODEL --gpus 4 --seq-length 16384 [--sample-length 7000]

MODEL is a folder with a `config.json`. Memory is counted from shapes (memory.py), time from FLOPs and bytes
(step_time.py) with this machine's rates (rates.py: measured once, else those of an H100).
"""

import argparse
import bisect
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from transformers import PretrainedConfig

from rsft_lib.common.paths import require_path
from rsft_lib.model.config import check_layout, read_config
from rsft_lib.model.weight_map import expert_count
from rsft_lib.training.config import CHOICES, TrainConfig
from rsft_lib.training.datasets import open_datasets
from rsft_lib.training.flops import training_flops
from rsft_lib.training.memory import GIB, memory
from rsft_lib.training.rates import Rates, read_rates
from rsft_lib.training.step_time import StepTime, step_time

USABLE = 0.92  # of a GPU's memory; the rest is CUDA's own, and what the allocator cannot use
NEARLY = 1.01  # layouts within 1 % are equally fast: then the simpler one, and the one with moments in fp32, is better
ROUNDED = 1.05  # gradients in bf16 lose 2 % when 128 micro-batches are summed: only if that is 5 % faster, or to fit
LAYOUT = (
    "tensor_parallel", "sequence_parallel", "pipeline_parallel", "context_parallel", "expert_parallel", "recompute",
    "recompute_layers", "moments", "gradients", "micro_batch_size",
)  # fmt: skip
MICRO_BATCHES = (1, 2, 4, 8)  # packs; with more, a CPU that starts the kernels keeps up with the GPU on short packs


class Advice(NamedTuple):
    """A layout and its predicted costs."""

    config: TrainConfig
    nbytes: float
    """Peak memory of a rank."""
    time: StepTime

    @property
    def rank(self) -> tuple[float, int]:
        """Order of preference: time, and 1 % more for each simplification that it lacks; more for lower precision."""
        config = self.config
        more = sum(getattr(config, name) > 1 for name in LAYOUT if name.endswith(("_parallel", "_size")))
        rounded = ROUNDED if config.gradients == "bf16" else 1.0
        return self.time.total * rounded * NEARLY ** (more + (config.moments == "bf16")), more


def advise(
    config: TrainConfig, hf: PretrainedConfig, ranks: int, rates: Rates, sample_length: float = 0.0
) -> list[Advice]:
    """The layouts of `config` that fit into memory, best first.

    Args:
        sample_length: see `step_time`.

    Raises:
        ValueError: none fits; the message has the one that needs least.
    """
    usable, by_hand = USABLE * rates.memory, settings_by_hand(config)
    layouts = list(_layouts(config, hf, ranks, rates.gpus_per_node))
    if not by_hand.keys() & {"recompute", "recompute_layers"}:
        layouts = [_least_recomputed(one, hf, ranks, usable) for one in layouts]
    possible = [
        Advice(one, memory(one, hf, ranks).total, step_time(one, hf, ranks, rates, sample_length)) for one in layouts
    ]
    fitting = sorted((a for a in possible if a.nbytes < usable), key=lambda advice: advice.rank)
    if fitting:
        return fitting
    fixed = "".join(f", {key}={value}" for key, value in by_hand.items())
    if not possible:
        raise ValueError(
            f"no layout is possible for {ranks} GPUs with global_batch_size={config.global_batch_size}{fixed}: packs, "
            f"heads or layers are not divisible. Take other GPUs, or a global_batch_size divisible by {ranks}"
        )
    least = min(possible, key=lambda advice: advice.nbytes)
    raise ValueError(
        f"no layout fits {ranks} GPUs of {usable / GIB:.1f} usable GiB at seq_length={config.seq_length}"
        f"{fixed}: the smallest, {name(least)}, needs {least.nbytes / GIB:.1f}. Take more GPUs or a shorter seq_length"
    )


def _layouts(config: TrainConfig, hf: PretrainedConfig, ranks: int, gpus_per_node: int) -> Iterator[TrainConfig]:
    """Those that are possible with what `config` sets, tensor-, context- and expert-parallel ranks on one machine."""
    sizes = [2**n for n in range(ranks.bit_length()) if ranks % 2**n == 0]
    searched = {
        "tensor_parallel": sizes, "pipeline_parallel": sizes, "context_parallel": sizes,
        "expert_parallel": sizes if expert_count(hf) else [1], "moments": CHOICES["moments"],
        "gradients": CHOICES["gradients"], "micro_batch_size": MICRO_BATCHES,
    }  # fmt: skip
    fixed = settings_by_hand(config)
    for values in itertools.product(*([fixed[key]] if key in fixed else searched[key] for key in searched)):
        layout = dict(zip(searched, values, strict=True))
        tensor, expert = layout["tensor_parallel"], layout["expert_parallel"]
        if gpus_per_node % (tensor * layout["context_parallel"]) or gpus_per_node % expert:
            continue
        # Not possible: model, ranks or batch are not divisible by a size.
        with suppress(ValueError):
            one = dataclasses.replace(config, **layout, sequence_parallel=tensor > 1)
            one.data_parallel(ranks)
            check_layout(hf, **one.layout())
            yield one


def _least_recomputed(config: TrainConfig, hf: PretrainedConfig, ranks: int, usable: float) -> TrainConfig:
    """`config` with as little recomputation as fits into `usable` bytes; with all of it if even that does not."""
    fits = lambda one: memory(one, hf, ranks).total < usable  # noqa: E731
    if fits(config):
        return config
    stage = hf.num_hidden_layers // (config.pipeline_parallel * config.virtual_pipeline)
    for kind in ("selective", "full"):
        some = [] if kind == "full" and expert_count(hf) else [*range(1, stage)]
        more = [dataclasses.replace(config, recompute=kind, recompute_layers=layers) for layers in (*some, 0)]
        if fits(more[-1]):
            break
    return more[bisect.bisect_left(more[:-1], True, key=fits)]


def settings_by_hand(config: TrainConfig) -> dict:
    """The settings of a layout that differ from their defaults."""
    defaults = TrainConfig.with_defaults({})
    return {key: getattr(config, key) for key in LAYOUT if getattr(config, key) != defaults[key]}


def laid_out(config: TrainConfig, layout: str, nproc: int, nodes: int = 1) -> TrainConfig:
    """`config` as it is given, or, with `layout` "auto", with the best layout for its data and these ranks.

    Settings that differ from their defaults stay as they are.

    Args:
        nproc: ranks on each of `nodes` machines, whose GPUs are assumed to be as this one's; without any, H100s.

    Raises:
        ValueError: no layout fits.
    """
    if layout == "given":
        return config
    data = open_datasets(config).train
    hf, ranks = read_config(require_path(config.checkpoint, "checkpoint")), nproc * nodes
    rates = dataclasses.replace(read_rates(), gpus_per_node=nproc)
    advice = advise(config, hf, ranks, rates, data.sample_length)
    print(table(advice, hf, ranks, rates, data.sample_length))
    if fixed := settings_by_hand(config):
        print("as set:", ", ".join(f"{key}={value}" for key, value in fixed.items()))
    return advice[0].config


def name(advice: Advice) -> str:
    """A layout in short, such as `TP2 CP2 selective, bf16 moments`."""
    config = advice.config
    short = {"TP": config.tensor_parallel, "PP": config.pipeline_parallel, "CP": config.context_parallel}
    sizes = [f"{key}{size}" for key, size in (short | {"EP": config.expert_parallel}).items() if size > 1]
    low = [key for key in ("moments", "gradients") if getattr(config, key) == "bf16"]
    layers = f" in {config.recompute_layers} layer" + "s" * (config.recompute_layers > 1)
    recompute = config.recompute + layers * (config.recompute_layers > 0)
    words = [*(sizes or ["replicas"]), *([recompute] if config.recompute != "none" else [])]
    packs = f", {config.micro_batch_size} packs at once" if config.micro_batch_size > 1 else ""
    return " ".join(words) + (f", bf16 {' and '.join(low)}" if low else "") + packs


def table(
    advice: list[Advice], hf: PretrainedConfig, ranks: int, rates: Rates, sample: float = 0.0, rows: int = 10
) -> str:
    """The best layouts, and why the first is before the others."""
    best = advice[0]
    tokens = best.config.global_batch_size * best.config.seq_length
    flops = training_flops(hf, tokens, tokens * (sample or best.config.seq_length))
    shown = _distinct(advice)[:rows]
    width = max(len(name(a)) for a in shown)
    lines = [f"{'':{width}}{'s/step':>8}{'tokens/s/GPU':>14}{'TFLOP/s/GPU':>13}{'GiB':>7}"]
    lines += [
        f"{name(a):{width}}{a.time.total:8.2f}{tokens / a.time.total / ranks:14,.0f}"
        f"{flops / a.time.total / ranks / 1e12:13.0f}{a.nbytes / GIB:7.1f}"
        for a in shown
    ]
    lines += [
        f"rates: {rates.source or rates.device}; memory usable: {USABLE * rates.memory / GIB:.1f} GiB",
        why(advice),
    ]
    return "\n".join(lines)


def why(advice: list[Advice]) -> str:
    """What the best layout spends its time on, whether another is faster, and what the next of another kind loses."""
    best = advice[0]
    parts = ", ".join(f"{part} {value / best.time.total:.0%}" for part, value in vars(best.time).items() if value)
    text = f"{name(best)} is best: its step is {parts}"
    fastest = min(advice, key=lambda a: a.time.total)
    faster = 1 - fastest.time.total / best.time.total
    if faster > NEARLY - 1:
        text += f"; {name(fastest)} is {faster:.1%} faster, not enough for less precise states or more partitioning"
    other = next((a for a in advice if _kind(a) != _kind(best) and a.time.total >= best.time.total), None)
    if other is None:
        return text
    slower = other.time.total / best.time.total - 1
    costs = {part: value - getattr(best.time, part) for part, value in vars(other.time).items()}
    part = max(costs, key=lambda part: costs[part])
    return f"{text}; {name(other)} takes {slower:.0%} more, most of it for {part}"


def _kind(advice: Advice) -> tuple:
    return tuple(getattr(advice.config, key) for key in LAYOUT if key.endswith("_parallel"))


def _distinct(advice: list[Advice]) -> list[Advice]:
    """The best of those with the same parallel sizes and kind of recomputation."""
    found: dict[tuple, Advice] = {}
    for one in advice:
        found.setdefault((_kind(one), one.config.recompute), one)
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one machine")
    parser.add_argument("--seq-length", type=int, default=16384)
    parser.add_argument("--global-batch-size", type=int, default=128)
    parser.add_argument("--precision", default="bf16", choices=CHOICES["precision"])
    parser.add_argument(
        "--sample-length", type=float, default=0.0, help="mean length of a token's sample; 0: a whole pack"
    )
    parser.add_argument("--rates", type=Path, help="a file that rsft_lib.training.rates has written")
    given = parser.parse_args()
    try:
        print(_advised(given))
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _advised(given: argparse.Namespace) -> str:
    hf = read_config(given.model)
    rates = dataclasses.replace(read_rates(given.rates), gpus_per_node=given.gpus_per_node)
    config = TrainConfig(
        checkpoint=str(given.model), data="", output="", seq_length=given.seq_length, precision=given.precision,
        global_batch_size=given.global_batch_size,
    )  # fmt: skip
    advice = advise(config, hf, given.gpus, rates, given.sample_length)
    return table(advice, hf, given.gpus, rates, given.sample_length)


if __name__ == "__main__":
    main()
