"""What continues prompts, given as token ids: transformers, or vLLM where it is installed. Both load a model once.

Both compute in the precision of the model and choose tokens alike, whatever its `generation_config.json` says.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from rsft_lib.common.progress import progress, without_bars
from rsft_lib.tokenizer.patch import load_tokenizer

BATCH = 64  # prompts that transformers continues at a time
ENGINES = ("auto", "transformers", "vllm")


class Sampling(NamedTuple):
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


Engine = Callable[[list[list[int]], Sampling], list[list[int]]]  # prompts -> what follows each, and its EOS


def open_engine(folder: str | Path, engine: str = "auto", batch_size: int = BATCH) -> Engine:
    """Load the model in `folder`.

    Args:
        engine: 'transformers', 'vllm', or 'auto' for vllm where it is installed and a GPU is there.

    Raises:
        ValueError: there is no such engine, or it is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; choose one of {', '.join(ENGINES)}")
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ValueError("engine is 'vllm', which is not installed: pip install vllm, or choose 'transformers'")
    folder = Path(folder)
    if engine == "vllm" or (engine == "auto" and installed and torch.cuda.is_available()):
        return _vllm(folder)
    return _transformers(folder, batch_size)


def _transformers(folder: Path, batch_size: int) -> Engine:
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=precision(folder), trust_remote_code=False)
    model.generation_config = GenerationConfig()  # a repetition penalty of the folder's would be one engine's alone
    model.to(device).eval()

    @torch.no_grad()
    def write(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        torch.manual_seed(sampling.seed)
        # Those of like length together, the longest first: little padding, and what does not fit fails at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        written: dict[int, list[int]] = {}
        with progress("answers", "questions", len(prompts)) as bar:
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                written |= zip(numbers, _batch(model, tokenizer, [prompts[i] for i in numbers], sampling), strict=True)
                bar.update(len(numbers))
        return [written[i] for i in range(len(prompts))]

    return write


def _batch(model, tokenizer, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    width = max(map(len, prompts))  # padding to the left, so that every prompt ends where writing begins
    # Padding is masked, so any token will do. A tokenizer may have none for it, or one that the model has no row for.
    pad = tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])  # [b, width]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    choice = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    found = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **choice,
    )
    return [_up_to_end(row, tokenizer.eos_token_id) for row in found[:, width:].tolist()]


def precision(folder: Path) -> str:
    """The dtype of a model: what `config.json` says, or else the dtype of a weight."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stated := config.get("dtype") or config.get("torch_dtype"):
        return stated
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    return "float32"


def _up_to_end(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids  # what follows is padding, with the same id


def _vllm(folder: Path) -> Engine:
    from vllm import LLM, SamplingParams

    eos = load_tokenizer(folder).eos_token_id
    model = LLM(model=str(folder), dtype=precision(folder))  # "auto" takes bf16 for a model of fp32

    def write(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        how = SamplingParams(
            temperature=sampling.temperature, seed=sampling.seed, max_tokens=sampling.max_new_tokens,
            stop_token_ids=[eos], detokenize=False,
        )  # fmt: skip
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], how)
        return [_up_to_end(list(request.outputs[0].token_ids), eos) for request in found]

    return write
