"""Inference engines from token ids to token ids: transformers, or vLLM if installed. Each loads a model once.

Both use the dtype of the model and the same sampling settings, and ignore its `generation_config.json`.
"""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria

from rsft_lib.common.progress import progress, without_bars
from rsft_lib.tokenizer.patch import load_tokenizer

BATCH = 64  # prompts per batch of transformers
ENGINES = ("auto", "transformers", "vllm")


class Sampling(NamedTuple):
    """Sampling settings; temperature 0 is greedy decoding.

    Every prompt has random numbers of its own (`seeds_of`), so what it samples does not depend on the others in its
    batch, up to rounding. `budget_tokens` limits the thoughts of an answer (`thinking_budget`), `max_new_tokens` all of
    it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    budget_tokens: int | None = None


Seen = Callable[[list[list[int]]], bool]  # ids of each continuation so far -> whether to stop


class Engine(Protocol):
    """Prompt ids -> ids of each continuation, EOS included.

    transformers calls `seen`, if given, after each token of a single batch; vLLM only at the end.
    """

    def __call__(self, prompts: list[list[int]], sampling: Sampling, seen: Seen | None = None) -> list[list[int]]: ...


def open_engine(folder: str | Path, engine: str = "auto", batch_size: int = BATCH) -> Engine:
    """Load the model in `folder`.

    Args:
        engine: 'transformers', 'vllm', or 'auto' for vLLM if it is installed and there is a GPU.

    Raises:
        ValueError: the engine is unknown or not installed.
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
    model.generation_config = GenerationConfig()  # vLLM would not apply the folder's repetition penalty
    model.to(device).eval()

    @torch.no_grad()
    def write(prompts: list[list[int]], sampling: Sampling, seen: Seen | None = None) -> list[list[int]]:
        seeds = seeds_of(prompts, sampling.seed)
        # Sorted by length, longest first: little padding, and an out-of-memory error comes at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        written: dict[int, list[int]] = {}
        with progress("answers", "questions", len(prompts)) as bar:
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                watch = _in_order(seen, numbers) if seen else None
                own = [_Sampler(sampling.temperature, [seeds[i] for i in numbers])] if sampling.temperature else []
                batch = _batch(model, tokenizer, [prompts[i] for i in numbers], sampling.max_new_tokens, own, watch)
                written |= zip(numbers, batch, strict=True)
                bar.update(len(numbers))
        return [written[i] for i in range(len(prompts))]

    return write


def _in_order(seen: Seen, numbers: list[int]) -> Seen:
    """`seen` for a batch whose rows are the prompts `numbers`."""
    return lambda rows: seen([row for _, row in sorted(zip(numbers, rows, strict=True))])


class _Watch(StoppingCriteria):
    """Shows each new token of a batch; `width` is the length of its prompts."""

    def __init__(self, width: int, eos: int, seen: Seen):
        self.width, self.eos, self.seen = width, eos, seen

    def __call__(self, input_ids, scores, **kwargs):
        rows = [_up_to_eos(row, self.eos) for row in input_ids[:, self.width :].tolist()]
        return torch.full(input_ids.shape[:1], self.seen(rows), device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Makes the greatest score of each row a sample of softmax(scores / temperature), by Gumbel noise of its own."""

    def __init__(self, temperature: float, seeds: list[int]):
        self.temperature, self.seeds = temperature, seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids, scores):  # [b, s], [b, vocab]
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores / self.temperature - noise.log()


def seeds_of(prompts: list[list[int]], seed: int) -> list[int]:
    """A seed below 2**63 for each prompt, from `seed`, its ids, and how often it was asked before in this list."""
    asked: Counter[bytes] = Counter()
    seeds = []
    for ids in prompts:
        digest = hashlib.sha256(f"{seed} {ids}".encode()).digest()
        asked[digest] += 1
        seeds.append(int.from_bytes(hashlib.sha256(digest + bytes(asked[digest])).digest()[:8], "little") >> 1)
    return seeds


def _batch(model, tokenizer, prompts, max_new_tokens: int, samplers: list, seen: Seen | None) -> list[list[int]]:
    width = max(map(len, prompts))  # left padding, so that all prompts end at the same position
    # Padding is masked, so any id will do. The pad token may be missing, or have no embedding row.
    pad = tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])  # [b, width]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        logits_processor=samplers,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        stopping_criteria=[_Watch(width, tokenizer.eos_token_id, seen)] if seen else None,
    )
    return [_up_to_eos(row, tokenizer.eos_token_id) for row in output[:, width:].tolist()]


def precision(folder: Path) -> str:
    """The dtype of a model: from `config.json`, or else from one of its weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if stated := config.get("dtype") or config.get("torch_dtype"):
        return stated
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            return str(file.get_tensor(next(iter(file.keys()))).dtype).removeprefix("torch.")
    return "float32"


def _up_to_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids  # the rest is padding, with the same id


def _vllm(folder: Path) -> Engine:
    from vllm import LLM, SamplingParams

    eos = load_tokenizer(folder).eos_token_id
    model = LLM(model=str(folder), dtype=precision(folder))  # "auto" would load an fp32 model in bf16

    def write(prompts: list[list[int]], sampling: Sampling, seen: Seen | None = None) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=sampling.temperature, seed=seed, max_tokens=sampling.max_new_tokens,
                stop_token_ids=[eos], detokenize=False,
            )
            for seed in seeds_of(prompts, sampling.seed)
        ]  # fmt: skip
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        written = [_up_to_eos(list(request.outputs[0].token_ids), eos) for request in outputs]
        if seen:
            seen(written)
        return written

    return write
