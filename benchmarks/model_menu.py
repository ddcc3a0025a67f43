"""The README's model menu: what `layout: auto` takes for each model and number of GPUs, measured or computed.

    python benchmarks/model_menu.py [--write]          print it, and put it into the README

Packs of 16,384 tokens filled with the real traces, 128 in a step, on H100s of 80 GB; machines of 8 GPUs. A cell has the
figures of MEASURED if exactly its layout was run on as many H100s, else those of rsft_lib.training.advisor.
"""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PretrainedConfig

from rsft_lib.training.advisor import LAYOUT, Advice, advise, name
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.flops import PEAKS, training_flops
from rsft_lib.training.memory import GIB
from rsft_lib.training.rates import H100

README = Path(__file__).parents[1] / "README.md"
LENGTH, PACKS = 16_384, 128
TRACES = 10_242  # mean length of a token's sample in the packs of train_gpu.py
GPUS = (1, 2, 4, 8, 16)
SHAPES = {  # project -> model_type, then FIELDS, as in the config.json of each; none has tied embeddings
    "r1-1.5b": ("qwen2", 151_936, 1536, 8960, 28, 12, 2),
    "r1-7b": ("qwen2", 152_064, 3584, 18_944, 28, 28, 4),
    "r1-llama-8b": ("llama", 128_256, 4096, 14_336, 32, 32, 8),
    "qwen3-8b": ("qwen3", 151_936, 4096, 12_288, 36, 32, 8),
    "r1-14b": ("qwen2", 152_064, 5120, 13_824, 48, 40, 8),
    "r1-32b": ("qwen2", 152_064, 5120, 27_648, 64, 40, 8),
}
FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
LOW = {"moments": "bf16", "gradients": "bf16"}
TP2, TP4 = ({"tensor_parallel": size, "sequence_parallel": True} for size in (2, 4))
CP2, CP4 = ({"context_parallel": size} for size in (2, 4))
FP8 = {"precision": "fp8"}
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}


def shape(project: str, **changes) -> PretrainedConfig:
    """The configuration of a project's model, as far as it has shapes, with `changes`."""
    kind, *sizes = SHAPES[project]
    given = {"tie_word_embeddings": False} | dict(zip(FIELDS, sizes, strict=True))
    return AutoConfig.for_model(kind, **given | changes)


class Measured(NamedTuple):
    """A training that was measured."""

    project: str
    gpus: int
    length: int
    """Tokens of a pack."""
    sample: int
    """Mean length of a token's sample; 0 for one sample per pack."""
    packs: int
    """Of a step."""
    layout: dict
    tokens_per_second: int
    """Of one GPU."""
    gib: float
    device: str = "H100"
    alone: bool = False
    """Whether one of the ranks was measured by itself, without exchanges."""


MEASURED = [
    Measured("r1-1.5b", 1, LENGTH, TRACES, 8, {}, 43_180, 51.4),
    Measured("r1-1.5b", 4, LENGTH, TRACES, 32, {}, 43_360, 38.8),
    Measured("r1-1.5b", 4, LENGTH, TRACES, 16, TP2, 33_800, 21.6),
    Measured("r1-1.5b", 1, 65_536, 0, 8, {**FULL, **LOW}, 14_693, 26.4),
    Measured("r1-1.5b", 4, LENGTH, TRACES, 16, {"pipeline_parallel": 4}, 29_510, 32.7),
    Measured("r1-7b", 4, LENGTH, TRACES, 16, {**TP2, **SELECTIVE}, 9_197, 46.8),
    Measured("r1-7b", 4, LENGTH, TRACES, 32, {**SELECTIVE, **LOW}, 10_403, 54.2),
    Measured("r1-7b", 4, LENGTH, TRACES, 32, {**FULL, **LOW}, 9_119, 44.7),
    Measured("r1-7b", 4, LENGTH, TRACES, 8, TP4, 9_312, 42.0),
    Measured("r1-7b", 4, LENGTH, TRACES, 16, {"pipeline_parallel": 2, **TP2}, 9_131, 55.0),
    Measured("r1-7b", 4, 32_768, 0, 8, {**TP4, **SELECTIVE}, 6_652, 36.4),
    Measured("r1-1.5b", 1, LENGTH, TRACES, 8, {}, 43_275, 51.4, "H200"),
    Measured("r1-1.5b", 1, 4_096, 0, 8, {}, 31_739, 33.2, "H200"),
    Measured("r1-1.5b", 1, 4_096, 0, 8, {"micro_batch_size": 4}, 51_322, 51.3, "H200"),
    Measured("r1-1.5b", 1, LENGTH, TRACES, 8, FP8, 51_279, 56.3, "H200"),
    Measured("r1-1.5b", 1, 65_536, 0, 2, {**SELECTIVE, **LOW}, 18_437, 46.5, "H200"),
    Measured("r1-1.5b", 1, 131_072, 0, 1, {**SELECTIVE, **LOW}, 10_965, 76.4, "H200"),
    Measured("r1-1.5b", 1, 131_072, 0, 1, {**FULL, "recompute_layers": 5, **LOW}, 10_473, 70.1, "H200"),
    Measured("r1-1.5b", 1, 262_144, 0, 1, {**FULL, **LOW}, 4_446, 65.3, "H200"),
    Measured("r1-1.5b", 2, LENGTH, TRACES, 8, TP2, 35_890, 25.8, "H200"),
    Measured("r1-1.5b", 2, LENGTH, TRACES, 8, {**TP2, "micro_batch_size": 2}, 37_111, 37.9, "H200"),
    Measured("r1-7b", 2, LENGTH, TRACES, 8, TP2, 10_799, 83.8, "H200"),
    Measured("r1-7b", 2, LENGTH, TRACES, 8, {**CP2, **LOW}, 11_069, 78.5, "H200"),
    Measured("r1-7b", 2, LENGTH, TRACES, 16, LOW, 11_877, 103.7, "H200"),
    Measured("r1-1.5b", 4, LENGTH, TRACES, 16, TP2, 41_790, 21.7, "H200", alone=True),
    Measured("r1-1.5b", 4, LENGTH, TRACES, 8, CP4, 27_117, 21.1, "H200", alone=True),
    Measured("r1-1.5b", 4, 65_536, 0, 2, CP4, 18_894, 40.6, "H200", alone=True),
    Measured("r1-1.5b", 4, 65_536, 0, 4, {**CP2, **SELECTIVE}, 18_562, 31.8, "H200", alone=True),
    Measured("r1-1.5b", 4, 131_072, 0, 1, {**CP4, **SELECTIVE}, 11_035, 32.7, "H200", alone=True),
    Measured("r1-1.5b", 4, 131_072, 0, 2, {**CP2, **SELECTIVE}, 11_104, 49.3, "H200", alone=True),
    Measured("r1-7b", 4, LENGTH, TRACES, 32, {**SELECTIVE, **LOW}, 10_593, 56.4, "H200", alone=True),
    Measured(
        "r1-7b", 4, LENGTH, TRACES, 32, {**SELECTIVE, "recompute_layers": 16, **LOW}, 11_338, 71.0, "H200", alone=True
    ),
    Measured("r1-7b", 4, LENGTH, TRACES, 32, {**SELECTIVE, **LOW, **FP8}, 14_532, 69.5, "H200", alone=True),
    Measured("r1-7b", 4, LENGTH, TRACES, 16, {**CP2, **LOW}, 12_360, 67.9, "H200", alone=True),
    Measured("r1-7b", 4, LENGTH, TRACES, 8, {**CP4, **LOW}, 11_919, 53.8, "H200", alone=True),
    Measured("r1-14b", 16, LENGTH, TRACES, 16, {"context_parallel": 8, **LOW}, 5_667, 73.4, "H200", alone=True),
]


def run(length: int, packs: int, **layout) -> TrainConfig:
    """Settings with `packs` packs of `length` tokens in a step."""
    return TrainConfig(checkpoint="c", data="d", output="o", seq_length=length, global_batch_size=packs, **layout)


def menu() -> str:
    """The table in Markdown: a row for each model, a cell for each number of GPUs; measured figures are bold."""
    rows = [["project", "1 GPU", *(f"{gpus} GPUs" for gpus in GPUS[1:])], ["---"] * (1 + len(GPUS))]
    rows += [[f"`{project}`", *(cell(project, gpus) for gpus in GPUS)] for project in SHAPES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(project: str, gpus: int) -> str:
    """Layout, tokens/s of a GPU, MFU and GiB; where nothing fits, the least memory that a layout needs."""
    config, hf = run(LENGTH, PACKS), shape(project)
    try:
        best, *_ = advise(config, hf, gpus, H100, TRACES)
    except ValueError:
        endless = dataclasses.replace(H100, memory=2**60)
        smallest = dataclasses.replace(config, recompute="full")
        least = min(one.nbytes for one in advise(smallest, hf, gpus, endless, TRACES))
        return f"needs {least / GIB:.0f} GiB"
    rate, gib, bold = PACKS * LENGTH / best.time.total / gpus, best.nbytes / GIB, ""
    if found := measured(project, gpus, best):
        rate, gib, bold = found.tokens_per_second, found.gib, "**"
    mfu = training_flops(hf, rate, rate * TRACES) / PEAKS["H100"]
    layout = name(best).replace(" and ", ", ").replace("replicas", "replicas" if gpus > 1 else "1 replica")
    return f"{layout}<br>{bold}{rate:,.0f} · {mfu:.2f} · {gib:.0f}{bold}"


def measured(project: str, gpus: int, advice: Advice) -> Measured | None:
    """The measurement of exactly this layout, if there is one."""
    same = (
        one
        for one in MEASURED
        if (one.project, one.gpus, one.length, one.sample, one.device) == (project, gpus, LENGTH, TRACES, "H100")
        and layout_of(run(LENGTH, one.packs, **one.layout)) == layout_of(advice.config)
    )
    return next(same, None)


def layout_of(config: TrainConfig) -> list:
    return [getattr(config, name) for name in LAYOUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the table in the README")
    table = menu()
    if parser.parse_args().write:
        text = re.sub(r"(?m)^\| project \| 1 GPU .*\n(\|.*\n)+", table + "\n", README.read_text(encoding="utf-8"))
        README.write_text(text, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
