"""A Jinja chat template, and conversations rendered with it."""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ARGUMENT_ITEMS = re.compile(r"arguments\s*\|\s*items")
ARGUMENTS_AS_JSON = re.compile(r"arguments['\"\]]*\s*\|\s*tojson")
ARGUMENTS_BY_TYPE = re.compile(r"arguments['\"\]]*\s+is\s+(?:not\s+)?(?:string|mapping)")
QUESTION_AND_ANSWER = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]


class Span(NamedTuple):
    """Trained characters `start` to `end` (exclusive) of a text; `code` is their index into LOSS_WEIGHTS."""

    start: int
    end: int
    code: int = 1


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template with the special tokens it may refer to."""

    source: str
    special_tokens: dict[str, Any]

    @classmethod
    def of(cls, tokenizer) -> "ChatTemplate":
        return cls(tokenizer.chat_template, tokenizer.special_tokens_map)

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks the assistant's output with `{% generation %}` blocks."""
        return GENERATION.search(self.source) is not None

    def render(self, messages: list[dict], tools: list[dict] | None = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, the generation prompt is appended.

        Raises:
            ValueError: the template fails on this conversation.
        """
        return self._render([messages], tools, prompt)[0][0]

    def render_marked(self, chats: list[list[dict]], tools: list[dict] | None = None) -> list[tuple[str, list[Span]]]:
        """The text of each conversation, and the spans of its `{% generation %}` blocks without `given`."""
        texts, blocks = self._render(chats, tools, marked=True)
        spans = [(text, _joined(own)) for text, own in zip(texts, blocks, strict=True)]
        return [(text, [self._without_given(text, span) for span in own]) for text, own in spans]

    @cached_property
    def given(self) -> str:
        """White space that a template marks as part of an answer although the generation prompt ends with it.

        TRL's template for Qwen2.5 marks the line end of the assistant's header, which the model never writes.
        """
        try:
            prompt = self.render(QUESTION_AND_ANSWER[:1], prompt=True)
            (text,), (blocks,) = self._render([QUESTION_AND_ANSWER], None, marked=True)
        except ValueError:
            return ""
        given = text[blocks[0][0] : len(prompt)] if blocks and text.startswith(prompt) else ""
        return given if given.isspace() else ""

    def _without_given(self, text: str, span: Span) -> Span:
        return span._replace(start=span.start + len(self.given) * text.startswith(self.given, span.start))

    def prepared(self, chat: list[dict]) -> list[dict]:
        """The messages as the template needs them: the arguments of tool calls as objects, unless it takes strings.

        Raises:
            ValueError: the arguments of a tool call are not a JSON object.
        """
        return [_with_objects(message) for message in chat] if self._needs_objects else chat

    @cached_property
    def _needs_objects(self) -> bool:
        """Whether the template reads arguments one by one, or writes them as JSON without a case for strings."""
        writes_json = ARGUMENTS_AS_JSON.search(self.source) and not ARGUMENTS_BY_TYPE.search(self.source)
        return bool(ARGUMENT_ITEMS.search(self.source) or writes_json)

    def _render(self, chats, tools, prompt=False, marked=False) -> tuple[list[str], list]:
        try:
            return render_jinja_template(
                [self.prepared(chat) for chat in chats],
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.special_tokens,
            )
        except TimeoutError:  # of rsft_lib.common.sandbox
            raise
        except Exception as error:  # a template is code and can raise anything
            refused = type(error) is TemplateError  # by `raise_exception` of the template
            why = f"refuses this conversation: {error}" if refused else f"fails on this conversation ({error!r})"
            raise ValueError(f"the chat template {why}") from error


def _with_objects(message: dict) -> dict:
    """A message whose tool calls have their arguments as an object, as servers pass them to templates."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            parsed = arguments
        if not isinstance(parsed, dict):
            raise ValueError(f"the arguments of a tool call, {arguments!r:.60}, are not a JSON object")
        calls.append({**call, "function": {**call["function"], "arguments": parsed}})
    return {**message, "tool_calls": calls} if calls else message


def _joined(blocks: list[tuple[int, int]]) -> list[Span]:
    """Blocks as spans; adjacent blocks are merged into one answer."""
    spans: list[Span] = []
    for start, end in blocks:
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end)
        elif end > start:
            spans.append(Span(start, end))
    return spans
