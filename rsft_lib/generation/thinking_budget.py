"""Answers with a thinking budget: after so many tokens of thoughts, `</think>` is written for the model.

In two passes, which any engine can do: thoughts of at most the budget, and then the rest of the answers, after a forced
`</think>` where the thoughts were still open. It is spelled as in training data that was cut (`data.budgets`).
"""

from transformers import PreTrainedTokenizerBase

from rsft_lib.generation.inference_engines import Engine, Sampling, Seen
from rsft_lib.tokenizer.dialect import END_THINK, THINK


def with_budget(engine: Engine, tokenizer: PreTrainedTokenizerBase, given: list[list[int]]) -> Engine:
    """An engine whose answers think for at most `sampling.budget_tokens` tokens after the `<think>` that begins them.

    A forced `</think>` counts as one of `max_new_tokens`. Answers in another mode are written in one pass, as without a
    budget, and so are all if the budget is at least `max_new_tokens`.

    Args:
        given: the ids of each answer that end its prompt.
    """
    vocabulary, eos = tokenizer.get_added_vocab(), tokenizer.eos_token_id
    think, end_think = (vocabulary.get(tag, -1) for tag in (THINK, END_THINK))

    def closed(answer: list[int], budget: int) -> list[int]:
        """The beginning of an answer, with `</think>` after its budget if the thoughts go on there."""
        kept, rest = answer[: 1 + budget], answer[1 + budget :]
        ends = {end_think, eos} & {*kept, *rest[:1]}
        return [*kept, end_think] if rest and kept[0] == think and not ends else answer

    def write(prompts: list[list[int]], sampling: Sampling, seen: Seen | None = None) -> list[list[int]]:
        budget, limit = sampling.budget_tokens or 0, sampling.max_new_tokens
        may_think = [i for i, ids in enumerate(given) if ids[:1] in ([], [think]) and end_think not in ids]
        # Two more tokens than the budget: <think>, if the model writes it, and one that shows that the thoughts go on.
        first = sampling._replace(max_new_tokens=min(budget + 2, limit))
        thoughts = engine([prompts[i] for i in may_think], first) if may_think else []
        written: list[list[int]] = [[] for _ in prompts]
        for i, ids in zip(may_think, thoughts, strict=True):
            written[i] = closed([*given[i], *ids], budget)[len(given[i]) :]
        unfinished = [i for i, ids in enumerate(written) if len(ids) < limit and eos not in ids]
        if unfinished:
            rest = sampling._replace(max_new_tokens=limit - min(len(written[i]) for i in unfinished))
            more = engine([prompts[i] + written[i] for i in unfinished], rest)
            for i, ids in zip(unfinished, more, strict=True):
                written[i] = [*written[i], *ids][:limit]
        if seen:
            seen(written)
        return written

    return write
