"""The notebooks 01 to 08 by papermill, as a project, on a model of real shape with random weights: the time of each.

    RSFT_REAL_DATA=FOLDER python benchmarks/chain_gpu.py --output OUT --gpus 4 [--project r1-7b] [--layers 20] [--to 04]

The model (15 GB for 7B) is written once; traces, short answers and tokenizer are those in RSFT_REAL_DATA. Training has
`layout: auto`, a few steps of 8 packs and one checkpoint with the states of the optimizer. Answers run to their limit,
since weights are random. --small tries it with a tiny model, also on a CPU.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

from model_menu import SHAPES, shape
from train_multi import SMALL

from rsft_lib.project import LAST, run

STEPS, PACKS, LENGTH = 5, 8, 16_384


def make_model(folder: Path, project: str, sizes: dict) -> None:
    """Write a model with random weights, unless it is there."""
    if folder.exists():
        return
    real = Path(os.environ["RSFT_REAL_DATA"]) / "tokenizers" / "r1-distill-qwen"
    hf = shape(project, max_position_embeddings=2**17, bos_token_id=151_646, eos_token_id=151_643, **sizes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16)
    unfinished = folder.with_name("unfinished")
    shutil.copytree(real, unfinished, dirs_exist_ok=True)
    network.save_pretrained(unfinished, max_shard_size="2GB")  # and its config.json, in place of the tokenizer's
    unfinished.rename(folder)


def make_data(folder: Path, traces: int, short: int) -> None:
    """Write the first traces and short answers."""
    data = Path(os.environ["RSFT_REAL_DATA"]) / "data"
    long = gzip.decompress((data / "long_planbench_r1.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (folder / "long.jsonl").write_bytes(b"".join(long[:traces]))
    lines = (data / "short_gsm8k_train.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "short.jsonl").write_bytes(b"".join(lines[:short]))


def write_project(folder: Path, gpus: int, small: bool) -> Path:
    """The project file; its outputs are in `folder`."""
    training = {"train_iters": STEPS, "global_batch_size": PACKS, "eval_iters": 1, "log_interval": 1}
    project = {
        "model": str(folder / "model"), "long": str(folder / "long.jsonl"), "short": str(folder / "short.jsonl"),
        "seq_length": LENGTH, "nproc": gpus,
        "05_train": training | ({"precision": "fp32", "train_iters": 1} if small else {"layout": "auto"}),
        "07_export_and_generate": {"questions": 4, "max_new_tokens": 8 if small else 128},
    }  # fmt: skip
    (folder / "project.yaml").write_text(yaml.safe_dump(project, sort_keys=False))
    return folder / "project.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the project; 152 GB for 7B, as 20 bytes a weight"
    )
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--project", default="r1-7b", choices=list(SHAPES), help="whose shape the model has")
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a smaller disk")
    parser.add_argument("--to", default=LAST, metavar="NOTEBOOK", help="the last to run; a later call goes on")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    fewer = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    make_model(folder / "model", arguments.project, SMALL if arguments.small else fewer)
    make_data(folder, traces=20 if arguments.small else 100, short=20 if arguments.small else 200)
    print(f"model and data: {time.perf_counter() - began:.0f} s", flush=True)
    try:
        run(str(write_project(folder, arguments.gpus, arguments.small)), last=arguments.to)
    finally:
        for path in sorted((folder / "executed").glob("*.ipynb")):
            seconds = json.loads(path.read_text())["metadata"]["papermill"]["duration"]
            print(f"{path.stem:28}{seconds or 0:8.1f} s", flush=True)


if __name__ == "__main__":
    main()
