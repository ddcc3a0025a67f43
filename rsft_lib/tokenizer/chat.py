"""Conversations as text and as tokens: what a chat template renders, and which part of it is trained.

A conversation is a list of messages with `role` (system, user, assistant, tool) and `content`. An assistant message
may carry `train: false`, to be context only, or `weight`, by which the loss of its tokens is multiplied.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

THINK, END_THINK, SHORT = "<think>", "</think>", "<short>"
MODES = {"think": THINK, "short": SHORT}

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REASONING = ("reasoning_content", "reasoning", "thinking")  # where other tools keep the chain of thought

# What the bytes of a loss mask mean: 0 is not trained, 1 is trained, 2 to 255 are weights 0.01 to 2.54.
LOSS_WEIGHTS = np.concatenate([[0, 1], np.arange(1, 255) / 100]).astype(np.float32)
MOST_WEIGHT = 2.54


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text are trained; `code` is their entry of LOSS_WEIGHTS."""

    start: int
    end: int
    code: int = 1


@dataclass(frozen=True)
class Encoded:
    """A conversation: `ids` and `loss_mask` have one entry per token; 0 in the mask is not trained."""

    ids: list[int]
    loss_mask: list[int]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja, with the special tokens that it may name."""

    source: str
    special_tokens: dict[str, Any]

    @classmethod
    def of(cls, tokenizer) -> "ChatTemplate":
        return cls(tokenizer.chat_template, tokenizer.special_tokens_map)

    @property
    def marks_answers(self) -> bool:
        """Whether `{% generation %}` blocks tell what the assistant writes."""
        return GENERATION.search(self.source) is not None

    def render(self, messages: list[dict], tools: list[dict] | None = None, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the assistant writes next.

        Raises:
            ValueError: the template fails on this conversation.
        """
        return self._render([messages], tools, prompt)[0][0]

    def render_marked(self, chats: list[list[dict]], tools: list[dict] | None = None) -> list[tuple[str, list[Span]]]:
        """Each conversation as text, and the characters within its `{% generation %}` blocks."""
        texts, blocks = self._render(chats, tools, marked=True)
        return [(text, _joined(own)) for text, own in zip(texts, blocks, strict=True)]

    def _render(self, chats, tools, prompt=False, marked=False) -> tuple[list[str], list]:
        try:
            return render_jinja_template(
                chats,
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.special_tokens,
            )
        except TimeoutError:  # of rsft_lib.common.sandbox
            raise
        except Exception as error:  # a template is code and raises what it likes
            raise ValueError(f"the chat template fails on this conversation ({error!r})") from error


def trained_texts(
    template: ChatTemplate, chats: list[list[dict]], tools: list[dict] | None = None, turns: str = "all"
) -> list[tuple[str, list[Span]]]:
    """Conversations as text, and which characters are trained: what the assistant writes, up to and with its EOS.

    The template says where its answers are, by `{% generation %}` blocks. Where it has none, an answer begins where
    the messages before it, rendered with the generation prompt, end; each rendering must continue the one before.

    Args:
        tools: what all of them may call.
        turns: 'all' trains every answer, 'last' only the last.

    Raises:
        ValueError: in one of them nothing is to be trained, the template drops or moves a message or changes an
            answer, or an answer does not end with EOS.
    """
    if template.marks_answers:
        marked = template.render_marked(chats, tools)
    else:
        marked = [_found(template, messages, tools) for messages in chats]
    eos = template.special_tokens.get("eos_token")
    found = []
    for messages, (text, places) in zip(chats, marked, strict=True):
        spans = _spans(messages, text, places, eos, turns)
        _check_order(messages, text, places)
        found.append((text, spans))
    return found


def trained_text(
    template: ChatTemplate, messages: list[dict], tools: list[dict] | None = None, turns: str = "all"
) -> tuple[str, list[Span]]:
    """`trained_texts` of one conversation."""
    return trained_texts(template, [messages], tools, turns)[0]


def encode(tokenizer, messages: list[dict], tools: list[dict] | None = None, turns: str = "all") -> Encoded:
    """Token ids of a conversation and which of them are trained, with a tokenizer of transformers.

        text   <bos> <｜User｜> 2 + 2 ? <｜Assistant｜> <short> 4 <eos>
        mask     0      0     0 0 0 0       0          1    1   1

    Raises:
        ValueError: as `trained_text`; or a token lies half inside an answer.
    """
    text, spans = trained_text(ChatTemplate.of(tokenizer), messages, tools, turns)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Encoded(encoding["input_ids"], mask_of(encoding["offset_mapping"], spans, text))


def mask_of(offsets: list[tuple[int, int]], spans: list[Span], text: str) -> list[int]:
    """The mask of tokens from the characters each covers: [tokens] codes of LOSS_WEIGHTS.

    Raises:
        ValueError: a token lies across the edge of an answer.
    """
    mask, ahead = [], list(reversed(spans))
    for start, end in offsets:
        while ahead and ahead[-1].end <= start:
            ahead.pop()
        span = ahead[-1] if ahead else Span(len(text), len(text))
        if end <= span.start:
            mask.append(0)
        elif span.start <= start and end <= span.end:
            mask.append(span.code)
        else:
            raise ValueError(across_edge(text[start:end], start))
    return mask


def across_edge(token: str, place: int) -> str:
    """The error for a token that is partly prompt and partly answer."""
    return (
        f"token {token!r} at character {place} lies across the edge of an answer; end the prompt with a special token"
    )


def prompt_ids(tokenizer, messages: list[dict], mode: str | None = None, tools: list[dict] | None = None) -> list[int]:
    """Token ids to generate from: the conversation, the assistant's header and the mode's control token.

    Args:
        mode: 'think' or 'short'; None leaves the choice to the model.
    """
    text = ChatTemplate.of(tokenizer).render(messages, tools, prompt=True)
    return tokenizer(text + (MODES[mode] if mode else ""), add_special_tokens=False)["input_ids"]


def weight_code(message: dict) -> int:
    """The entry of LOSS_WEIGHTS for an assistant message, from its `train` and `weight`.

    Raises:
        ValueError: the weight is not one from 0 to 2.54.
    """
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST_WEIGHT:
        raise ValueError(f"weight is {weight!r:.60}; it must be a number from 0 to {MOST_WEIGHT}, in hundredths")
    if weight == 1 or not message.get("train", True):
        return int(message.get("train", True))
    hundredths = round(100 * weight)
    return hundredths + 1 if hundredths else 0


def _spans(messages: list[dict], text: str, places: list[Span], eos: str | None, turns: str) -> list[Span]:
    """The places of a conversation's answers, checked, without what is not trained."""
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(places) != len(answers):
        raise ValueError(f"the chat template marks {len(places)} answers, the conversation has {len(answers)}")
    spans = []
    for turn, (start, end, _) in zip(answers, places, strict=True):
        end = start + _check_answer(messages[turn], turn, text[start:end], eos)
        code = weight_code(messages[turn]) if turns == "all" or turn == answers[-1] else 0
        if code:
            spans.append(Span(start, end, code))
    if not spans:
        raise ValueError("the conversation has no assistant message to train on")
    return spans


def _found(template: ChatTemplate, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[Span]]:
    """A conversation as text, and where its answers lie, found from what is rendered without each."""
    text, places = template.render(messages, tools), []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = template.render(messages[:turn], tools, prompt=True)
        upto = text if turn == len(messages) - 1 else template.render(messages[: turn + 1], tools)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise ValueError(
                f"message {turn}: the chat template renders the conversation before this answer differently once the "
                "answer is there, so what to train cannot be told; patch the template (notebook 01_patch_tokenizer)"
            )
        places.append(Span(len(prompt), len(upto)))
    return text, places


def _check_answer(message: dict, turn: int, answer: str, eos: str | None) -> int:
    """Length of `answer` up to and with its EOS; all that the message says must be in it."""
    said = [message.get(name) for name in ("content", *REASONING)]
    said += [call["function"]["name"] for call in message.get("tool_calls") or ()]
    if any(part and part.strip() not in answer for part in said):
        raise ValueError(
            f"message {turn}: the chat template drops part of the answer, such as the chain of thought; "
            "patch the template (notebook 01_patch_tokenizer)"
        )
    length = len(answer.rstrip())  # some templates put a line break after EOS
    if not eos or not answer[:length].endswith(eos):
        raise ValueError(f"message {turn}: the chat template does not end the answer with {eos!r}")
    return length


def _check_order(messages: list[dict], text: str, places: list[Span]) -> None:
    """What every message says must be in the text, in the order of the messages; `places` are those of the answers.

    R1's template, for one, shows the last of several system messages only, and moves it to the front.
    """
    answers, at = iter([*places, Span(len(text), len(text))]), 0
    following = next(answers)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if following.start < at:
                raise ValueError(misplaced(turn, message))
            at, following = following.end, next(answers)
            continue
        said = (message.get("content") or "").strip()
        found = text.find(said, at, following.start)
        if found < 0:
            raise ValueError(misplaced(turn, message))
        at = found + len(said)


def misplaced(turn: int, message: dict) -> str:
    """The error for a message that is not in the text of its conversation, or not where it was said."""
    return (
        f"message {turn} ({message['role']}): the chat template drops it, changes it or puts it elsewhere: "
        f"{message.get('content')!r:.60} is not found between the messages before and after it"
    )


def _joined(blocks: list[tuple[int, int]]) -> list[Span]:
    """Blocks as spans; those that touch are one answer."""
    spans: list[Span] = []
    for start, end in blocks:
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end)
        elif end > start:
            spans.append(Span(start, end))
    return spans
