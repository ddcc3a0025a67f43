"""Paths as given by users: relative ones start at the working directory, as everywhere in Python."""

import re
from pathlib import Path

MAKERS = {  # missing input -> the notebook that makes it
    "model folder": "01_patch_tokenizer, which makes the tiny one, or 07_export_and_generate, for a trained one",
    "tokenizer": "01_patch_tokenizer on a model folder that has this file",
    "tokenizer folder": "01_patch_tokenizer",
    "checkpoint": "02_convert_checkpoint",
    "training data": "03_build_dataset", "dataset of the tokens": "03_build_dataset",
    "held-out records": "03_build_dataset",
    "data": "04_tokenize_and_inspect", "eval_data": "04_tokenize_and_inspect", "tokens": "04_tokenize_and_inspect",
    "eval_more": "04_tokenize_and_inspect on these records",
    "run folder": "05_train",
    "exported model": "07_export_and_generate",
    "folder of token losses": "08_loss_lab",
}  # fmt: skip


def project_root() -> Path:
    """The checkout that this library is part of.

    Raises:
        FileNotFoundError: the library is installed without one.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "notebooks").is_dir():
        raise FileNotFoundError(
            f"the notebooks need a checkout of the project, but rsft_lib is installed in {root}: clone the project and "
            "run `pip install -e .` in it"
        )
    return root


def resolve(path: str | Path) -> Path:
    """`path` as an absolute one, `~` expanded; links are not followed."""
    return Path(path).expanduser().absolute()


def require_path(path: str | Path, what: str) -> Path:
    """The resolved `path`, which must exist; `what` describes it in the error and selects the hint (`MAKERS`).

    Raises:
        FileNotFoundError: the path does not exist.
    """
    resolved = resolve(path)
    if not resolved.exists():
        hint = f"run notebook {MAKERS[what]}, or give an existing path" if what in MAKERS else "check the path"
        raise FileNotFoundError(f"{what}: {resolved} does not exist: {hint}")
    return resolved


def folder_name(model: str) -> str:
    """The folder name of a Hub model under `assets/checkpoints`.

    >>> folder_name("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    'deepseek_ai_DeepSeek_R1_Distill_Qwen_1.5B'
    """
    return re.sub(r"[/-]", "_", model)
