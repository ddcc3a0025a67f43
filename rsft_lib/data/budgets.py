"""Thinking budgets: cut chains of thought at a random token, so that a model learns to answer from what it has.

whole   <think> Start: two. Now: two plus three is five. </think> Answer: five <eos>
cut     <think> Start: two. Now: two                     </think> Answer: five <eos>
mask       1      1     1     1   1                         0        1     1     1

The forced close is the one token `</think>` in every dialect: nothing merges with it, and generation writes the same
(`generation.thinking_budget`). It is not trained (`thoughts_cut` in `tokenizer.chat`), since the budget writes it and
not the model. NVIDIA's recipe for Nemotron 3 cuts 3 to 12 % of the traces, https://github.com/NVIDIA-NeMo/Nemotron.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from rsft_lib.data.pairs import THINK
from rsft_lib.data.scratch import BATCH, Scratch
from rsft_lib.tokenizer.dialect import END_THINK
from rsft_lib.tokenizer.dialect import THINK as OPEN_THINK


class Budgets(NamedTuple):
    """A `share` of the long answers gets a budget drawn uniformly from `least` to `most` tokens of thoughts.

    With `most` 0 it is drawn from `least` to the length of the answer's own thoughts, without the last token.
    """

    share: float
    least: int = 1
    most: int = 0

    def drawn(self, thoughts: int, draw: float) -> int:
        """The budget for a trace of `thoughts` tokens; `draw` is in [0, 1)."""
        return self.least + int(draw * max((self.most or thoughts - 1) - self.least + 1, 1))

    def check(self, tokenizer: object) -> None:
        """Check the settings.

        Raises:
            ValueError: they make no sense, or there is no tokenizer.
        """
        if not 0 <= self.share <= 1 or self.least < 1 or 0 < self.most < self.least:
            raise ValueError(
                f"budget_share={self.share} must be from 0 to 1, budget_min={self.least} at least 1, and "
                f"budget_max={self.most} at least budget_min, or 0 for the length of each trace"
            )
        if self.share and not tokenizer:
            raise ValueError(f"budget_share={self.share}, but budgets are in tokens: give `tokenizer`")


class Trace:
    """A tokenized answer with thoughts."""

    def __init__(self, answer: str, encoding: Encoding):
        self.answer, self.ids, self.offsets = answer, encoding.ids, encoding.offsets
        self.first = encoding.tokens.index(OPEN_THINK) + 1
        self.close = encoding.tokens.index(END_THINK)

    def cut(self, budget: int) -> str:
        """The answer with the first `budget` tokens of its thoughts."""
        end = self.offsets[self.first + budget][0]
        return self.answer[:end] + self.answer[self.offsets[self.close][0] :]

    def ids_cut(self, budget: int) -> list[int]:
        return self.ids[: self.first + budget] + self.ids[self.close :]

    def says_something(self, budget: int) -> bool:
        """Whether the thoughts are not blank within a budget, so that a cut trace is no short answer of any dialect."""
        return bool(self.answer[self.offsets[self.first][0] : self.offsets[self.first + budget][0]].strip())


def cut_thoughts(
    scratch: Scratch, numbers: np.ndarray, tokenizer_json: str, budgets: Budgets, seed: int
) -> dict[str, int | list[int]]:
    """Cut the thoughts of a share of the long answers among the samples `numbers`, in place.

    Returns:
        `long`: number of long answers; `cut`: how many were cut; `whole`: how many stayed whole, as their thoughts are
        within their budget; `tokens`: minimum, median and maximum of the thoughts that cut answers have left.
    """
    long = numbers[scratch.rows["mode"][numbers] == THINK]
    random = np.random.default_rng([seed, 1])
    chosen = np.sort(random.choice(long, round(budgets.share * len(long)), replace=False))
    tokenizer, left = Tokenizer.from_str(tokenizer_json), []
    draws = random.random(len(chosen)).tolist()
    for first in range(0, len(chosen), BATCH):
        batch = chosen[first : first + BATCH].tolist()
        records = [scratch.record(number) for number in batch]
        answers = [record["output"] for record in records]
        cuts = cut_answers(tokenizer, answers, budgets, draws[first : first + BATCH])
        for number, record, cut in zip(batch, records, cuts, strict=True):
            if cut:
                output, tokens, thoughts = cut
                scratch.replace(number, record | {"output": output, "thoughts_cut": True}, tokens)
                left.append(thoughts)
    kept = [int(np.percentile(left, q, method="nearest")) for q in (0, 50, 100)] if left else []
    return {"long": len(long), "cut": len(left), "whole": len(chosen) - len(left), "tokens": kept}


def cut_answers(
    tokenizer: Tokenizer, answers: Sequence[str], budgets: Budgets, draws: Sequence[float]
) -> list[tuple[str, int, int] | None]:
    """Each answer cut at its budget, its tokens and those of its thoughts; None for one that stays whole.

    A cut is moved to the left until the tokens before it, `</think>` and the answer are those of the whole answer: in
    the middle of a word or character, a tokenizer reads the rest of it as other tokens.
    """
    encode = lambda texts: tokenizer.encode_batch(texts, add_special_tokens=False)  # noqa: E731
    traces = [Trace(*pair) for pair in zip(answers, encode(answers), strict=True)]
    drawn = [budgets.drawn(trace.close - trace.first, draw) for trace, draw in zip(traces, draws, strict=True)]
    trying = {i: n for i, n in enumerate(drawn) if n < traces[i].close - traces[i].first}
    result: list[tuple[str, int, int] | None] = [None] * len(answers)
    while trying := {i: n for i, n in trying.items() if traces[i].says_something(n)}:
        texts = [traces[i].cut(n) for i, n in trying.items()]
        for (i, n), text, encoding in zip([*trying.items()], texts, encode(texts), strict=True):
            if encoding.ids == traces[i].ids_cut(n):
                result[i] = text, len(encoding.ids), n
                del trying[i]
            else:
                trying[i] = n - 1
    return result
