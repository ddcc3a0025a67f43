"""Answers of an exported model in a forced mode, or the mode it chooses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from transformers import PreTrainedTokenizerBase

from rsft_lib.common.artifact import own_manifest
from rsft_lib.common.paths import require_path
from rsft_lib.generation.answer import Answer
from rsft_lib.generation.inference_engines import BATCH, Engine, Sampling, open_engine
from rsft_lib.generation.questions import Question
from rsft_lib.generation.thinking_budget import with_budget
from rsft_lib.tokenizer.chat import prompt_ids
from rsft_lib.tokenizer.dialect import END_THINK, MODES, PLAIN, PREFILLED, THINK, THINKLESS, Dialect, dialect_of
from rsft_lib.tokenizer.patch import load_tokenizer

ASKED = (*MODES, None, "other")  # modes of `generate_modes`


def generate(
    model: str | Path,
    prompts: Sequence[str | Question],
    mode: str | None,
    max_new_tokens: int = 256,
    batch_size: int = BATCH,
    dialect: Dialect | None = None,
) -> list[Answer]:
    """Greedy answers of the model in folder `model`; each prompt is a user message or a conversation.

    Args:
        mode: 'think' or 'short' asks for that mode, as the dialect does; None lets the model choose.
        dialect: None for the one that the model was trained with, as its export recorded.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such mode.
    """
    sampling = Sampling(max_new_tokens)
    return generate_modes(model, prompts, [mode], sampling, batch_size=batch_size, dialect=dialect)[mode]


def generate_modes(
    model: str | Path,
    prompts: Sequence[str | Question],
    modes: Sequence[str | None],
    sampling: Sampling,
    engine: str = "auto",
    batch_size: int = BATCH,
    dialect: Dialect | None = None,
) -> dict[str | None, list[Answer]]:
    """The answers in each of several modes, with the model loaded once.

    Args:
        modes: 'think', 'short', None to let the model choose, or 'other' for a model without modes.
        engine: see `inference_engines.open_engine`.
        dialect: see `generate`.

    Raises:
        ValueError: there is no such mode or engine.
    """
    if unknown := [mode for mode in modes if mode not in ASKED]:
        raise ValueError(f"mode is {unknown[0]!r}; choose one of {', '.join(map(repr, ASKED))}")
    return open_speaker(model, engine, batch_size, dialect).in_modes(prompts, modes, sampling)


@dataclass(frozen=True)
class Speaker:
    """A loaded model that answers in its dialect."""

    tokenizer: PreTrainedTokenizerBase
    dialect: Dialect
    write: Engine

    def in_modes(
        self, prompts: Sequence[str | Question], modes: Sequence[str | None], sampling: Sampling
    ) -> dict[str | None, list[Answer]]:
        """The answers in each of several modes."""
        return {mode: self.answers([(prompt, mode) for prompt in prompts], sampling) for mode in modes}

    def within_budgets(
        self, prompts: Sequence[str | Question], whole: Sequence[Answer], sampling: Sampling
    ) -> dict[int | None, list[Answer]]:
        """The answers with thoughts by thinking budget in tokens, from the smallest to that of `whole`, None for none.

        The budgets are a quarter, a half, once and twice the median length of the thoughts of `whole`, which are the
        answers to the prompts by `sampling`.
        """
        thoughts = [answer.text.removeprefix(THINK).partition(END_THINK)[0] for answer in whole]
        lengths = [len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in thoughts]
        budgets = {int(factor * median(lengths)) for factor in (0.25, 0.5, 1, 2)} if lengths else set()
        most = sampling.max_new_tokens if sampling.budget_tokens is None else sampling.budget_tokens
        asked = [(prompt, "think") for prompt in prompts]
        limited = {n: sampling._replace(budget_tokens=n) for n in sorted(budgets) if 0 < n < most}
        within: dict[int | None, list[Answer]] = {n: self.answers(asked, each) for n, each in limited.items()}
        return within | ({sampling.budget_tokens: list(whole)} if whole else {})

    def answers(
        self,
        asked: Sequence[tuple[str | Question, str | None]],
        sampling: Sampling,
        seen: Callable[[list[Answer]], bool] | None = None,
    ) -> list[Answer]:
        """The answer to each question in its mode.

        Args:
            seen: called after each token with the answers so far, if all are in one batch; returns whether to stop.
                With a budget it is called once, at the end.
        """
        forms = [mode if mode in self.dialect.forms else None for _, mode in asked]
        prompts = [self.prompt(question, mode) for question, mode in asked]
        openings = [self.dialect.opening(form) for form in forms]  # the answer's tokens that end the prompt
        given = [self.tokenizer(opening, add_special_tokens=False)["input_ids"] for opening in openings]

        def read(written: list[list[int]]) -> list[Answer]:
            return [_answer(self.tokenizer, [*g, *w], self.dialect) for g, w in zip(given, written, strict=True)]

        show = (lambda written: seen(read(written))) if seen else None
        write = self.write if sampling.budget_tokens is None else with_budget(self.write, self.tokenizer, given)
        return read(write(prompts, sampling, show))

    def prompt(self, question: str | Question, mode: str | None) -> list[int]:
        """The ids of a question asked in a mode; in none, if the dialect has no such mode.

        Raises:
            ValueError: the chat template fails on this conversation.
        """
        return _prompt_ids(self.tokenizer, question, mode if mode in self.dialect.forms else None, self.dialect)


def open_speaker(
    model: str | Path, engine: str = "auto", batch_size: int = BATCH, dialect: Dialect | None = None
) -> Speaker:
    """Load an exported model; for the arguments and errors see `generate_modes`."""
    folder = require_path(model, "exported model")
    return Speaker(load_tokenizer(folder), dialect or trained_dialect(folder), open_engine(folder, engine, batch_size))


def trained_dialect(model: str | Path) -> Dialect:
    """The dialect that the export of a model recorded; Thinkless for a model that was not exported by this kit."""
    return dialect_of(own_manifest(Path(model)))


def dialect_of_any(model: str | Path) -> Dialect:
    """How a model is asked for a mode: an export of this kit in its dialect, any other by the tags that it knows."""
    if own_manifest(Path(model)).get("made_by") == "export":
        return trained_dialect(model)
    vocabulary = load_tokenizer(model).get_vocab().keys()
    return next((dialect for dialect in (THINKLESS, PREFILLED) if {*dialect.tags} <= vocabulary), PLAIN)


def _prompt_ids(tokenizer, prompt: str | Question, mode: str | None, dialect: Dialect) -> list[int]:
    question = Question([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else prompt
    return prompt_ids(tokenizer, question.messages, mode, question.tools, dialect)


def _answer(tokenizer, ids: list[int], dialect: Dialect) -> Answer:
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    ids = ids[:-1] if ended else ids
    return Answer(tokenizer.decode(ids), len(ids), ended, dialect)
