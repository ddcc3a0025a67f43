"""Answers with a thinking budget, against a model that is asked for one token at a time."""

import random
from types import SimpleNamespace

import pytest

from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.thinking_budget import with_budget

THINK, END, SHORT, EOS = range(4)
VOCABULARY = {"<think>": THINK, "</think>": END, "<short>": SHORT}
TOKENIZER = SimpleNamespace(get_added_vocab=lambda: VOCABULARY, eos_token_id=EOS)


def following(ids: list[int]) -> int:
    """The next token of a model whose thoughts and answers end after some ten tokens each."""
    weights = [9 if len(ids) < 3 else 0.5, 1, 1, *[2] * 5]  # one that may choose often chooses to think
    return random.Random(str(ids)).choices([THINK, END, EOS, *range(4, 9)], weights)[0]


def write(prompts: list[list[int]], sampling: Sampling, seen=None) -> list[list[int]]:
    """An engine."""
    return [one_by_one(prompt, [], sampling.max_new_tokens, None) for prompt in prompts]


def one_by_one(prompt: list[int], given: list[int], limit: int, budget: int | None) -> list[int]:
    written: list[int] = []
    while len(written) < limit and EOS not in written:
        token, answer = following([*prompt, *written]), [*given, *written]
        thoughts = len(answer) - 1 if answer[:1] == [THINK] and END not in answer else -1
        written.append(END if thoughts == budget and token not in (END, EOS) else token)
    return written


@pytest.mark.parametrize("budget", [0, 1, 2, 5, 9, 29, 30, 31])
@pytest.mark.parametrize("given", [[THINK], [SHORT], [THINK, END], []])
def test_thoughts_are_closed_at_the_budget_and_nowhere_else(given, budget):
    prompts = [[8, number, *given] for number in range(4, 204)]
    sampling = Sampling(30, budget_tokens=budget)
    found = with_budget(write, TOKENIZER, [given] * len(prompts))(prompts, sampling)
    whole = write(prompts, sampling)
    assert found == [one_by_one(prompt, given, 30, budget) for prompt in prompts]
    assert (found == whole) == (budget >= 30 - (not given) or given in ([SHORT], [THINK, END]))


def test_answers_in_several_modes_are_written_together_and_seen_at_the_end():
    givens = [[THINK], [SHORT], [], [THINK]]
    prompts, seen = [[8, number, *given] for number, given in enumerate(givens, start=4)], []
    found = with_budget(write, TOKENIZER, givens)(prompts, Sampling(30, budget_tokens=3), seen.append)
    assert seen == [found]
    assert found == [one_by_one(prompt, given, 30, 3) for prompt, given in zip(prompts, givens, strict=True)]
