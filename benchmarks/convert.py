"""Time and memory to convert a model to Megatron and back, relative to `cp` with fsync of the same bytes.

    python benchmarks/convert.py                 # R1-Distill-Qwen-1.5B's shape, random weights, 3.6 GB
    python benchmarks/convert.py --shape 7b --layers 4

Each step runs in its own process. Memory is the peak of anonymous memory (RssAnon of /proc/self/status), without page
cache and mapped files. `cp` runs before and after every step, also in its own process; ratios are to the mean of both.
All files are in the page cache when a step begins. Needs disk space for four copies of the model, and no GPU.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from rsft_lib.common.paths import project_root

SHAPES = {
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "heads": 12, "groups": 2, "layers": 28},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "heads": 28, "groups": 4, "layers": 28},
}
VOCAB = 151_936


def make_model(folder: str, shape: str, layers: int) -> None:
    """A Qwen2 with random finite bf16 weights, and a tokenizer."""
    import torch
    from transformers import Qwen2Config

    from rsft_lib import demo
    from rsft_lib.checkpoint.formats import hf
    from rsft_lib.checkpoint.lazy_weights import Weights
    from rsft_lib.model.weight_map import hf_shapes

    size = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=size["hidden_size"], intermediate_size=size["intermediate_size"],
        num_attention_heads=size["heads"], num_key_value_heads=size["groups"], num_hidden_layers=layers,
        tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    random = torch.randint(-(2**15), 2**15, (VOCAB * size["hidden_size"] + 1_000_000,), dtype=torch.int16)
    random = (random & ~0x4000).view(torch.bfloat16)  # exponents below 128
    shapes, tensors = hf_shapes(config), {}
    for number, (name, of) in enumerate(shapes.items()):
        tensors[name] = random[number : number + torch.Size(of).numel()].view(of)
    demo.make_model(Path(folder).with_name("tokenizer"), seed=0)
    Path(folder).mkdir()
    hf.write(Path(folder), Weights.of(tensors), "5GB")
    config.save_pretrained(folder)


def copy(source: str, destination: str) -> None:
    """The baseline of every step: `cp`, and fsync of every file."""
    subprocess.run(["cp", "-r", source, destination], check=True)
    for path in Path(destination).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def into_megatron(source: str, destination: str) -> None:
    from rsft_lib.checkpoint.convert import convert

    convert(source, destination)


def out_of_megatron(source: str, destination: str) -> None:
    from rsft_lib.checkpoint.export import export

    export(source, Path(source).with_name("tokenizer"), destination)


def through_transformers(source: str, destination: str) -> None:
    """The naive baseline: load the whole model with transformers and save it."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(destination)


def hash_only(source: str, destination: str) -> None:
    """Lower bound of a step that hashes its output on one thread."""
    from rsft_lib.common.artifact import file_hash

    for path in Path(source).iterdir():
        file_hash(path)


def measured(step, *arguments) -> dict:
    """Run a step in a fresh process: seconds without imports, and peak anonymous memory in bytes."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (step, arguments))


def _measure(step, arguments) -> dict:
    import rsft_lib.checkpoint.export  # noqa: F401

    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    before = _anonymous()
    watcher.start()
    began = time.perf_counter()
    step(*arguments)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"seconds": seconds, "peak": peak[0], "before": before}


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, default=0, help="layers; 0 for all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=project_root() / "outputs", help="folder for temporary files")
    parser.add_argument("--peers", action="store_true", help="also load and save with transformers")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        print(json.dumps(run(Path(place), arguments), indent=2))


def run(place: Path, arguments) -> dict:
    layers = arguments.layers or SHAPES[arguments.shape]["layers"]
    measured(make_model, str(place / "hf"), arguments.shape, layers)
    measured(into_megatron, str(place / "hf"), str(place / "megatron"))
    steps = {
        "hf -> torch_dist": (into_megatron, place / "hf"),
        "torch_dist -> hf": (out_of_megatron, place / "megatron"),
        "sha256 only": (hash_only, place / "hf"),
    }
    if arguments.peers:
        steps["transformers load + save"] = (through_transformers, place / "hf")
    size = sum(path.stat().st_size for path in (place / "hf").iterdir())
    result = {"shape": arguments.shape, "layers": layers, "gigabytes": round(size / 1e9, 2)}
    for name, (step, source) in steps.items():
        result[name] = summary([one_round(step, source, place) for _ in range(arguments.rounds)])
    return result


def one_round(step, source: Path, place: Path) -> dict:
    before = once(copy, source, place)
    result = once(step, source, place)
    after = once(copy, source, place)
    return {**result, "cp": (before["seconds"] + after["seconds"]) / 2}


def once(step, source: Path, place: Path) -> dict:
    result = measured(step, str(source), str(place / "out"))
    shutil.rmtree(place / "out", ignore_errors=True)
    return result


def summary(rounds: list[dict]) -> dict:
    median = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    return {
        "seconds": round(median["seconds"], 2),
        "cp seconds": round(median["cp"], 2),
        "ratio to cp": round(statistics.median(r["seconds"] / r["cp"] for r in rounds), 2),
        "peak GB": round(median["peak"] / 1e9, 3),
        "of it imports GB": round(median["before"] / 1e9, 3),
    }


if __name__ == "__main__":
    main()
