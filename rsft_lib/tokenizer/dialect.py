r"""Dialects of hybrid reasoning: how a prompt asks for a mode, and how an answer in that mode is written.

dialect    mode    the user's message ends with   the prompt ends with   the answer is
thinkless  think                                  <think>                <think> thoughts </think> answer
           short                                  <short>                <short> answer
qwen3      think    /think                                               <think>\n thoughts \n</think>\n\n answer
           short    /no_think                                            <think>\n\n</think>\n\n answer

thinkless is that of Thinkless, https://arxiv.org/abs/2505.13379; qwen3 that of Qwen3, whose report calls it thinking
mode fusion, https://arxiv.org/abs/2505.09388. A dialect is one row of `DIALECTS`; nothing else depends on its name.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

THINK, END_THINK, SHORT = "<think>", "</think>", "<short>"
TAGS = re.compile("|".join((THINK, END_THINK, SHORT)))
MODES = {"think": THINK, "short": SHORT}
MODE_NAMES = (*MODES, "other")  # 'other': an answer without the opening of a mode


class Form(NamedTuple):
    """The form of a mode: the user's message + `switch` asks for `opening` + thoughts + `closing` + answer."""

    opening: str
    closing: str = ""
    switch: str = ""


class Opening(NamedTuple):
    """The tokens with which the answers in a mode begin, `offset` tokens after the first trained one (0 or below).

    Of an answer whose mode was given they are the last tokens that are not trained.
    """

    ids: tuple[int, ...]
    offset: int = 0


@dataclass(frozen=True)
class Dialect:
    """A way of asking for a mode and of answering in it; `forms` is by mode."""

    name: str
    forms: dict[str, Form]
    given: tuple[str, ...] = ()
    """Modes whose opening ends the prompt that asks for them; the model writes that of other modes."""
    empty_block: str = ""
    """The mode whose opening is an empty think block, which may be masked; '' if there is none."""
    masked: bool = False
    """Whether that block is context: given by the prompt, and not trained."""

    @cached_property
    def tags(self) -> list[str]:
        """The tags that answers contain, each once."""
        return list(dict.fromkeys(tag for mode in self.forms for tag in self.tags_of(mode)))

    @property
    def context(self) -> str:
        """The beginning of an answer that is not trained; '' for none."""
        return self.forms[self.empty_block].opening if self.masked else ""

    @property
    def hard_switch(self) -> str:
        """Jinja for the end of a chat template: `enable_thinking=False` ends the prompt with the empty think block.

        So Qwen3's own template does; here it goes with any template. '' if the dialect has no such block.
        """
        if not self.empty_block:
            return ""
        block = self.forms[self.empty_block].opening.replace("\n", r"\n")
        condition = "add_generation_prompt and enable_thinking is defined and enable_thinking is false"
        return f"{{%- if {condition} %}}{{{{- '{block}' }}}}{{%- endif %}}"

    def tags_of(self, mode: str) -> list[str]:
        """The tags of an answer in a mode, in order."""
        return TAGS.findall(self.forms[mode].opening + self.forms[mode].closing)

    def opening(self, mode: str | None) -> str:
        """The text at the end of a prompt that asks for a mode; '' if the model chooses or writes it itself."""
        return self.forms[mode].opening if mode in self.given else ""

    def ask(self, text: str, mode: str | None) -> str:
        """A user's message that asks for a mode, or for none, whatever it asked for before."""
        return self.without_switch(text)[0] + (self.forms[mode].switch if mode else "")

    def without_switch(self, text: str) -> tuple[str, str | None]:
        """(a user's message without the switch at its end, the mode that the switch asks for or None)."""
        for mode, form in self.forms.items():
            if form.switch and re.search(rf"(?:^|\s){re.escape(form.switch.strip())}\s*$", text):
                return text.rstrip().removesuffix(form.switch.strip()).rstrip(), mode
        return text, None

    def mode_of(self, answer: str) -> str:
        """The mode of an answer by its beginning, in which any white space equals any other: one of MODE_NAMES."""
        matching = [mode for mode in self.forms if self._begins(mode).match(answer)]
        return max(matching, key=lambda mode: len(self.forms[mode].opening), default="other")

    def write(self, mode: str, thoughts: str, answer: str) -> str:
        """An answer in a mode; line breaks that belong to the form are not doubled."""
        opening, closing, _ = self.forms[mode]
        if opening.endswith("\n"):
            thoughts, answer = thoughts.strip(), answer.lstrip()
        return opening + thoughts + closing + answer

    def check(self, messages: list[dict], reasoning: Iterable[str] = ()) -> None:
        """Check that every answer is in the mode that was last asked for, and written exactly in its form.

        Args:
            reasoning: message fields with a separate chain of thought.

        Raises:
            ValueError: an answer contradicts the last switch before it, or its opening differs in white space.
        """
        asked = None
        for turn, message in enumerate(messages):
            content = message.get("content") or ""
            if message["role"] in ("system", "user"):
                asked = self.without_switch(content)[1] or asked
            elif message["role"] == "assistant" and content and message.get("train", True):
                mode = "think" if any(message.get(name) for name in reasoning) else self.mode_of(content)
                self._check_answer(f"message {turn}", content, mode, asked)

    def _begins(self, mode: str) -> re.Pattern:
        """What answers in a mode begin with; where another mode is an empty think block, the thoughts are not blank."""
        opening = r"\s*".join(map(re.escape, self.forms[mode].opening.split()))
        return re.compile(opening + (r"\s*\S" if self.empty_block not in ("", mode) else ""))

    def _check_answer(self, place: str, answer: str, mode: str, asked: str | None) -> None:
        if asked and mode != asked:
            raise ValueError(
                f"{place}: the user asks for {self.forms[asked].switch.strip()!r}, but the answer is in mode {mode} of "
                f"the dialect {self.name}: it begins with {answer[:24]!r}"
            )
        exact = self.forms[mode].opening if mode == self.empty_block else ""
        if exact and (not answer.startswith(exact) or answer[len(exact) :][:1].isspace()):
            raise ValueError(
                f"{place}: the empty think block must be exactly {exact!r} and then the answer, found "
                f"{answer[: len(exact) + 4]!r}"
            )


THINKLESS = Dialect(
    "thinkless",
    {"think": Form(THINK, END_THINK), "short": Form(SHORT)},
    given=("think", "short"),
)
QWEN3 = Dialect(
    "qwen3",
    {
        "think": Form(f"{THINK}\n", f"\n{END_THINK}\n\n", " /think"),
        "short": Form(f"{THINK}\n\n{END_THINK}\n\n", "", " /no_think"),
    },
    empty_block="short",
)  # fmt: skip
DIALECTS = {dialect.name: dialect for dialect in (THINKLESS, QWEN3)}
# How a model is asked that was not trained by this kit. One that thinks answers short after an empty think block, as in
# "NoThinking", https://arxiv.org/abs/2504.09858, and as Qwen3 does; one without <think> in its vocabulary always does.
PREFILLED = replace(
    QWEN3, name="prefilled", given=("think", "short"),
    forms={mode: form._replace(switch="") for mode, form in QWEN3.forms.items()},
)  # fmt: skip
PLAIN = Dialect("plain", {})


def dialect_of(settings: dict) -> Dialect:
    """The dialect that settings name: `dialect`, by default thinkless, and `empty_block`, 'trained' or 'masked'.

    Raises:
        ValueError: a name is unknown, or the dialect has no empty think block to mask.
    """
    name, block = settings.get("dialect", THINKLESS.name), settings.get("empty_block", "trained")
    if name not in DIALECTS:
        raise ValueError(f"dialect is {name!r}; choose one of {', '.join(DIALECTS)}")
    if block not in ("trained", "masked"):
        raise ValueError(f"empty_block is {block!r}; choose one of trained, masked")
    dialect = DIALECTS[name]
    if block == "trained":
        return dialect
    if not dialect.empty_block:
        raise ValueError(f"empty_block is 'masked', but answers of the dialect {name} have no empty think block")
    return replace(dialect, given=(dialect.empty_block,), masked=True)


def openings_of(tokenizer, dialect: Dialect) -> tuple[Opening, ...]:
    """The opening of each mode in tokens, in the order of MODES; without ids if the tokenizer lacks one of its tags.

    White space at its end is left out, since it may be one token with what follows.
    """
    vocabulary = tokenizer.get_added_vocab()
    openings = []
    for mode, form in dialect.forms.items():
        tags = TAGS.findall(form.opening)
        if any(tag not in vocabulary for tag in tags):
            openings.append(Opening(()))
        elif [form.opening.rstrip()] == tags:
            openings.append(Opening((vocabulary[tags[0]],)))
        else:
            offset = -len(_ids(tokenizer, form.opening)) if dialect.masked and mode == dialect.empty_block else 0
            openings.append(Opening(tuple(_ids(tokenizer, form.opening.rstrip())), offset))
    return tuple(openings)


def choice_of(tokenizer, dialect: Dialect) -> tuple[int, ...]:
    """(position in an answer, the token of each mode there) where the openings of the modes first differ.

        thinkless   0   <think>, <short>                 qwen3   1   \\n, \\n\\n

    Empty if the tokenizer lacks a tag or one opening is, in tokens, the beginning of the other.
    """
    if any(tag not in tokenizer.get_added_vocab() for tag in dialect.tags):
        return ()
    sequences = [_ids(tokenizer, form.opening) for form in dialect.forms.values()]
    return next(((at, *ids) for at, ids in enumerate(zip(*sequences, strict=False)) if len({*ids}) > 1), ())


def modes_of(tokens: np.ndarray, first: np.ndarray, openings: Iterable[Opening]) -> np.ndarray:
    """The mode of each answer: the last of `openings` that is found there.

    Args:
        tokens: int [tokens].
        first: int [answers], the position of the first trained token of each answer.

    Returns:
        uint8 [answers], indices into MODE_NAMES.
    """
    modes = np.full(len(first), MODE_NAMES.index("other"), dtype=np.uint8)
    for mode, (ids, offset) in enumerate(openings):
        for begins in {offset, -len(ids)} if ids else ():
            places = first[:, None] + begins + np.arange(len(ids))  # [answers, ids]
            inside = ((places >= 0) & (places < len(tokens))).all(axis=1)
            found = (tokens[places.clip(0, len(tokens) - 1)] == np.array(ids, dtype=np.int64)).all(axis=1)
            modes[inside & found] = mode
    return modes


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
