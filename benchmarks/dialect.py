"""Is the masked empty think block to blame? Obedience of a tiny model by how the block is trained and how it is asked.

    PYTHONPATH=. python benchmarks/dialect.py FOLDER [STEPS]

Trains the tiny model twice in Qwen3's dialect, with the empty think block trained and masked, and asks both held-out
questions by the switch alone, and with the block at the end of the prompt (`enable_thinking=False`).
"""

import sys
from pathlib import Path

from rsft_lib import TrainConfig, build_hybrid, convert, demo, export, patch_tokenizer, tokenize, train
from rsft_lib.generation.answer import obeyed
from rsft_lib.generation.generate import generate_modes
from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.questions import held_out_questions
from rsft_lib.tokenizer.dialect import QWEN3, dialect_of

BLOCKS = {name: dialect_of({"dialect": "qwen3", "empty_block": name}) for name in ("trained", "masked")}
ASKED = {"the switch": BLOCKS["trained"], "the switch and the block": BLOCKS["masked"]}


def prepare(folder: Path) -> None:
    demo.make_model(folder / "model", seed=1)
    demo.make_sources(folder / "sources", 2000, seed=1)
    patch_tokenizer(folder / "model", folder / "tokenizer", {}, dialect="qwen3")
    convert(folder / "model", folder / "megatron")
    long, short = (folder / "sources" / f"{name}.jsonl" for name in ("long", "short"))
    build_hybrid(long, short, folder / "hybrid", held_out=0.1, seed=1, dialect="qwen3")


def trained_model(folder: Path, block: str, steps: int) -> Path:
    tokens, run, exported = (folder / f"{name}-{block}" for name in ("tokens", "run", "exported"))
    data = folder / "hybrid" / "train.jsonl"
    tokenize(data, folder / "tokenizer", tokens, 257, dialect="qwen3", empty_block=block)
    config = TrainConfig(
        **demo.TINY | {"seq_length": 256}, checkpoint=str(folder / "megatron"), data=str(tokens), output=str(run),
        train_iters=steps, seed=1,
    )  # fmt: skip
    train(config, nproc=1)
    export(run, folder / "tokenizer", exported)
    return exported


def main(folder: Path, steps: int = 60) -> None:
    prepare(folder)
    questions = held_out_questions(folder / "hybrid" / "heldout.jsonl", 200, QWEN3)
    rows = []
    for block in BLOCKS:
        model = trained_model(folder, block, steps)
        for way, dialect in ASKED.items():
            found = generate_modes(model, questions, ["think", "short"], Sampling(8), dialect=dialect)
            rows.append((block, way, *(f"{obeyed(answers, mode):.1%}" for mode, answers in found.items())))
    for row in [("empty block", "asked by", "/think obeyed", "/no_think obeyed"), *rows]:
        print("{:<13}{:<27}{:<16}{}".format(*row))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
