"""What continues prompts, given as token ids: transformers, or vLLM where it is installed. Both load a model once."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from rsft_lib.progress import progress, without_bars
from rsft_lib.tokenizer import load_tokenizer

BATCH = 64  # prompts that transformers continues at a time
ENGINES = ("auto", "transformers", "vllm")


class Sampling(NamedTuple):
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


Engine = Callable[[list[list[int]], Sampling], list[list[int]]]  # prompts -> what follows each, and its EOS


def open_engine(folder: Path, engine: str = "auto", batch_size: int = BATCH) -> Engine:
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
    if engine == "vllm" or (engine == "auto" and installed and torch.cuda.is_available()):
        return _vllm(folder)
    return _transformers(folder, batch_size)


def _transformers(folder: Path, batch_size: int) -> Engine:
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).to(device).eval()

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
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])  # [b, width]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    # All of them said, so that `generation_config.json` changes nothing and both engines choose alike.
    choice = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    found = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **choice,
    )
    return [_up_to_end(row, tokenizer.eos_token_id) for row in found[:, width:].tolist()]


def _up_to_end(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids  # what follows is padding, with the same id


def _vllm(folder: Path) -> Engine:
    from vllm import LLM, SamplingParams

    eos = load_tokenizer(folder).eos_token_id
    model = LLM(model=str(folder), dtype="auto")

    def write(prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        how = SamplingParams(
            temperature=sampling.temperature, seed=sampling.seed, max_tokens=sampling.max_new_tokens,
            stop_token_ids=[eos], detokenize=False,
        )  # fmt: skip
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], how)
        return [_up_to_end(list(request.outputs[0].token_ids), eos) for request in found]

    return write
