"""Answers from an exported model in either mode, with transformers, and how good they are."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rsft_lib.chat import END_THINK, SHORT, THINK, prompt_ids
from rsft_lib.paths import existing
from rsft_lib.tokenizer import load_tokenizer

MARKS = re.compile("|".join((THINK, END_THINK, SHORT)))


@dataclass(frozen=True)
class Answer:
    """What a model wrote: the text from the control token on, its tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def generate(
    model: str | Path, prompts: list[str], mode: str | None, max_new_tokens: int = 256, batch_size: int = 64
) -> list[Answer]:
    """Greedy answers of the model in folder `model` to one user message each.

    Args:
        mode: 'think' or 'short' puts the control token before the answer; None lets the model choose.
    """
    folder = existing(model, "model folder")
    tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = [
            prompt_ids(tokenizer, [{"role": "user", "content": prompt}], mode)
            for prompt in prompts[start : start + batch_size]
        ]
        answers += _batch(loaded, tokenizer, batch, 1 if mode else 0, max_new_tokens)
    return answers


def _batch(model, tokenizer, prompts: list[list[int]], forced: int, max_new_tokens: int) -> list[Answer]:
    """`forced` is how many tokens at the end of every prompt belong to the answer."""
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])  # [b, width]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    written = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return [_answer(tokenizer, row) for row in written[:, width - forced :].tolist()]


def _answer(tokenizer, ids: list[int]) -> Answer:
    ended = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids  # what follows is padding, with the same id
    return Answer(tokenizer.decode(ids), len(ids), ended)


def well_formed(answer: Answer, mode: str) -> bool:
    """Whether an answer keeps to its mode and ends.

    think: `<think>` thoughts `</think>` answer; short: `<short>` answer, with no thoughts.
    """
    expected = [THINK, END_THINK] if mode == "think" else [SHORT]
    *_, rest = answer.text.rpartition(expected[-1])
    begins = answer.text.startswith(expected[0])
    return answer.ended and begins and MARKS.findall(answer.text) == expected and bool(rest.strip())


def final_answer(text: str) -> str | None:
    """What stands after the last `Answer:`, or None."""
    _, found, answer = text.rpartition("Answer:")
    return answer.strip() if found else None


def score(answers: list[Answer], expected: list[str], mode: str) -> dict[str, float]:
    """Shares of right and of well-formed answers, from 0 to 1, and their mean length in tokens."""
    n = len(answers)
    right = sum(final_answer(a.text) == e for a, e in zip(answers, expected, strict=True))
    return {
        "accuracy": right / n,
        "well_formed": sum(well_formed(a, mode) for a in answers) / n,
        "tokens": sum(a.tokens for a in answers) / n,
    }
