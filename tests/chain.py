"""The notebooks as a chain: parameters of each, and outputs of an executed notebook."""

from pathlib import Path

import nbformat

STEPS = 6


def chained(folder: Path) -> dict[str, dict]:
    """Parameters of notebooks 01 to 08; each uses the outputs of earlier ones in `folder`."""
    names = ("model", "tokenizer", "megatron", "hybrid", "tokens", "run", "out", "lab")
    place = {name: str(folder / name) for name in names}
    tokens = {split: f"{place['tokens']}/Tokenized-{split}-tokenizer-513" for split in ("train", "heldout")}
    sources = {name: str(folder / "sources" / f"{name}.jsonl") for name in ("long", "short")}
    return {
        "01_patch_tokenizer": {"model": place["model"], "output": place["tokenizer"]},
        "02_convert_checkpoint": {"model": place["model"], "output": place["megatron"]},
        "03_build_dataset": {**sources, "output": place["hybrid"], "tokenizer": place["tokenizer"]},
        "04_tokenize_and_inspect": {
            "data": place["hybrid"], "tokenizer": place["tokenizer"], "output": place["tokens"],
        },
        "05_train": {
            "checkpoint": place["megatron"], "data": tokens["train"], "eval_data": tokens["heldout"],
            "output": place["run"], "train_iters": STEPS, "eval_interval": 3, "nproc": 2,
            "eval_generate_every": STEPS, "eval_question_count": 3, "eval_max_new_tokens": 8,
        },
        "06_loss_curves": {"runs": place["run"], "output": str(folder / "curves")},
        "07_export_and_generate": {
            "run": place["run"], "tokenizer": place["tokenizer"], "output": place["out"],
            "held_out": f"{place['hybrid']}/heldout.jsonl", "questions": 4, "max_new_tokens": 8,
        },
        "08_loss_lab": {
            "before": place["megatron"], "run": place["run"], "data": tokens["train"], "output": place["lab"],
            "filtered": str(folder / "filtered"), "nproc": 1,
        },
    }  # fmt: skip


def outputs(executed: Path) -> list[dict]:
    return [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]


def pictures(executed: Path) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(executed))
