"""Which text of a record may spell a control token: the content of an answer those of thinking, and no other text any.

An answer whose chain of thought stands in a field of its own has no such token in its content either.

<think> thoughts </think> answer     <short> answer     answer     the forms of an answer
"""

import re
from collections.abc import Collection

from rsft_lib.data.conversation import strings
from rsft_lib.tokenizer.chat import END_THINK, REASONING, SHORT, THINK

TAGS = (THINK, END_THINK, SHORT)
TAGS_PATTERN = re.compile("|".join(TAGS))
FORMS = ([], [THINK, END_THINK], [SHORT])  # the tags of an answer, the first of them at its beginning


def well_formed(answer: str) -> bool:
    """Whether an answer has the tags of one mode, at their places."""
    found = list(TAGS_PATTERN.finditer(answer))
    return [match[0] for match in found] in FORMS and all(match.start() == 0 for match in found[:1])


class ControlTokens:
    """The tokens of a vocabulary that text should not become by chance."""

    def __init__(self, tokens: Collection[str]):
        """`tokens` are those that a tokenizer finds anywhere in text: its added tokens."""
        tokens = {token for token in tokens if token.strip()}
        self.text, self.answer = _any_of(tokens), _any_of(tokens - {*TAGS})

    def refuse(self, messages: list[dict], tools: list[dict] | None) -> None:
        """Check every text of a conversation: names and arguments of tool calls, and a chain of thought in a field too.

        Raises:
            ValueError: one of them spells a control token where none may stand.
        """
        for i, message in enumerate(messages):
            for name, value in message.items():
                declared = name == "content" and message["role"] == "assistant"
                if declared and any(message.get(field) for field in REASONING):
                    _refuse_second(f"messages[{i}]", value)
                _refuse(f"messages[{i}].{name}", value, self.answer if declared else self.text)
        _refuse("tools", tools, self.text)


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _refuse_second(place: str, content: str | None) -> None:
    if tags := TAGS_PATTERN.findall(content or ""):
        raise ValueError(f"{place} has {' '.join(tags)} in its content and a chain of thought beside it; keep one")


def _refuse(place: str, value, forbidden: re.Pattern) -> None:
    for text in strings(value):
        if found := forbidden.search(text):
            raise ValueError(
                f"{place}: the text holds {found[0]!r} at character {found.start()}, which would become a control "
                "token; remove it, or set control_tokens to 'allow'"
            )
