"""Reject records whose text contains a control token; only an answer's content may contain the thinking tags.

If the chain of thought is in a separate field, the content must not contain them either. The forms of an answer are

<think> thoughts </think> answer     <short> answer     answer

and those of another dialect are the same with its tags, see `tokenizer.dialect`.
"""

import re
from collections.abc import Collection

from rsft_lib.data.conversation import strings
from rsft_lib.tokenizer.chat import REASONING
from rsft_lib.tokenizer.dialect import TAGS, THINKLESS, Dialect


def well_formed(answer: str, dialect: Dialect = THINKLESS) -> bool:
    """Whether an answer has one of the forms above; its first tag begins it."""
    tags = list(TAGS.finditer(answer))
    forms = [[], *map(dialect.tags_of, dialect.forms)]
    return [match[0] for match in tags] in forms and all(match.start() == 0 for match in tags[:1])


class ControlTokens:
    """The added tokens of a vocabulary, which must not occur in text by accident."""

    def __init__(self, tokens: Collection[str], dialect: Dialect = THINKLESS):
        """`tokens`: the added tokens of a tokenizer, which it matches anywhere in text."""
        tokens = {token for token in tokens if token.strip()}
        foreign = {*THINKLESS.tags} - {*dialect.tags}  # tags of data for another dialect, tokens or not
        self.text, self.answer = _any_of(tokens), _any_of((tokens | foreign) - {*dialect.tags})

    def refuse(self, messages: list[dict], tools: list[dict] | None) -> None:
        """Check every string of a conversation, including tool calls and separate chains of thought.

        Raises:
            ValueError: one of them contains a control token that is not allowed there.
        """
        for i, message in enumerate(messages):
            for name, value in message.items():
                is_answer = name == "content" and message["role"] == "assistant"
                if is_answer and any(message.get(field) for field in REASONING):
                    _refuse_second(f"messages[{i}]", value)
                _refuse(f"messages[{i}].{name}", value, self.answer if is_answer else self.text)
        _refuse("tools", tools, self.text)


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _refuse_second(place: str, content: str | None) -> None:
    if tags := TAGS.findall(content or ""):
        raise ValueError(f"{place} has {' '.join(tags)} in its content and also a separate chain of thought; keep one")


def _refuse(place: str, value, forbidden: re.Pattern) -> None:
    for text in strings(value):
        if match := forbidden.search(text):
            raise ValueError(
                f"{place}: the text contains {match[0]!r} at character {match.start()}, which would become a control "
                "token; remove it, or set control_tokens to 'allow'"
            )
