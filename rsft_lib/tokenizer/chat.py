"""Render conversations with a chat template, tokenize them, and compute the loss mask.

A conversation is a list of messages with `role` (system, user, assistant, tool) and `content`. An assistant message
may have `train: false`, which makes it context only, `weight`, a factor on the loss of its tokens,
`mode_given: true`, with which its control token is context, as in a prompt that asks for the mode, or
`thoughts_cut: true`, with which its `</think>` is context: a thinking budget wrote it, not the model.
"""

import json
from dataclasses import dataclass

import numpy as np

from rsft_lib.tokenizer.chat_template import ChatTemplate, Span
from rsft_lib.tokenizer.dialect import END_THINK, TAGS, THINK, THINKLESS, Dialect

# Message fields in which other tools keep the chain of thought.
REASONING = ("reasoning_content", "reasoning", "thinking")

# Loss weight of each byte of a loss mask: 0 is not trained, 1 is trained, 2 to 255 are weights 0.01 to 2.54.
LOSS_WEIGHTS = np.concatenate([[0, 1], np.arange(1, 255) / 100]).astype(np.float32)
MOST_WEIGHT = 2.54


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation: `ids` and `loss_mask`, one entry per token; mask 0 is not trained."""

    ids: list[int]
    loss_mask: list[int]


def trained_texts(
    template: ChatTemplate,
    chats: list[list[dict]],
    tools: list[dict] | None = None,
    turns: str = "all",
    context: str = "",
) -> list[tuple[str, list[Span]]]:
    """The text of each conversation, and its trained spans: the assistant's answers, including their EOS.

    Answers are located by the template's `{% generation %}` blocks. Without these, an answer begins where the preceding
    messages, rendered with the generation prompt, end; each rendering must be a prefix of the next.

    Args:
        tools: the tools available in all of the conversations.
        turns: 'all' trains every answer, 'last' only the last.
        context: text that is not trained at the beginning of an answer (`Dialect.context`).

    Raises:
        ValueError: a conversation has nothing to train, the template drops, moves or changes a message, or an answer
            does not end with EOS.
    """
    if template.marks_answers:
        marked = template.render_marked(chats, tools)
    else:
        marked = [_locate_answers(template, messages, tools) for messages in chats]
    eos = template.special_tokens.get("eos_token")
    result = []
    for messages, (text, answers) in zip(chats, marked, strict=True):
        spans = _trained_spans(messages, text, answers, eos, turns, context)
        _check_order(messages, text, answers)
        result.append((text, spans))
    return result


def encode(
    tokenizer, messages: list[dict], tools: list[dict] | None = None, turns: str = "all", context: str = ""
) -> Encoded:
    """Token ids and loss mask of a conversation, with a transformers tokenizer.

        text   <bos> <｜User｜> 2 + 2 ? <｜Assistant｜> <short> 4 <eos>
        mask     0      0     0 0 0 0       0          1    1   1

    Raises:
        ValueError: as `trained_texts`, or a token crosses the boundary of an answer.
    """
    text, spans = trained_texts(ChatTemplate.of(tokenizer), [messages], tools, turns, context)[0]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Encoded(encoding["input_ids"], mask_of(encoding["offset_mapping"], spans, text))


def mask_of(offsets: list[tuple[int, int]], spans: list[Span], text: str) -> list[int]:
    """The loss mask of tokens from their character offsets: [tokens] indices into LOSS_WEIGHTS.

    Raises:
        ValueError: a token crosses the boundary of an answer.
    """
    mask, remaining = [], list(reversed(spans))
    for start, end in offsets:
        while remaining and remaining[-1].end <= start:
            remaining.pop()
        span = remaining[-1] if remaining else Span(len(text), len(text))
        if end <= span.start:
            mask.append(0)
        elif span.start <= start and end <= span.end:
            mask.append(span.code)
        else:
            raise ValueError(
                f"token {text[start:end]!r} at character {start} crosses the boundary of an answer; end the prompt "
                "with a special token"
            )
    return mask


def prompt_ids(
    tokenizer,
    messages: list[dict],
    mode: str | None = None,
    tools: list[dict] | None = None,
    dialect: Dialect = THINKLESS,
) -> list[int]:
    """Token ids of `prompt_text`."""
    return tokenizer(prompt_text(tokenizer, messages, mode, tools, dialect), add_special_tokens=False)["input_ids"]


def prompt_text(
    tokenizer,
    messages: list[dict],
    mode: str | None = None,
    tools: list[dict] | None = None,
    dialect: Dialect = THINKLESS,
) -> str:
    """A prompt that asks for a mode: the conversation, the assistant's header and what the dialect adds.

    Args:
        mode: 'think' or 'short'; None lets the model choose.
    """
    users = [turn for turn, message in enumerate(messages) if message["role"] == "user"]
    asking = [
        message | {"content": dialect.ask(message["content"], mode)} if turn in users[-1:] else message
        for turn, message in enumerate(messages)
    ]
    text, opening = ChatTemplate.of(tokenizer).render(asking, tools, prompt=True), dialect.opening(mode)
    if opening and text.rstrip().endswith(THINK):  # as the prompts of R1's own template do
        text = text.rstrip().removesuffix(THINK)
    return text + opening


def weight_code(message: dict) -> int:
    """The index into LOSS_WEIGHTS for an assistant message, from its `train` and `weight`.

    Raises:
        ValueError: the weight is not a number from 0 to 2.54.
    """
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= MOST_WEIGHT:
        raise ValueError(f"weight is {weight!r:.60}; it must be a number from 0 to {MOST_WEIGHT} in steps of 0.01")
    if weight == 1 or not message.get("train", True):
        return int(message.get("train", True))
    hundredths = round(100 * weight)
    return hundredths + 1 if hundredths else 0


def _trained_spans(
    messages: list[dict], text: str, answers: list[Span], eos: str | None, turns: str, context: str
) -> list[Span]:
    """Check the spans of a conversation's answers, and return those that are trained."""
    answer_turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if len(answers) != len(answer_turns):
        raise ValueError(f"the chat template marks {len(answers)} answers, the conversation has {len(answer_turns)}")
    spans = []
    for turn, (start, end, _) in zip(answer_turns, answers, strict=True):
        end = start + _check_answer(messages[turn], turn, text[start:end], eos)
        code = weight_code(messages[turn]) if turns == "all" or turn == answer_turns[-1] else 0
        if code:
            given = TAGS.match(text, start) if messages[turn].get("mode_given") else None
            start = given.end() if given else start + len(context) * text.startswith(context, start)
            spans += _around_forced_close(messages[turn], turn, text, Span(start, end, code))
    if not spans:
        raise ValueError("the conversation has no assistant message to train on")
    return spans


def _around_forced_close(message: dict, turn: int, text: str, answer: Span) -> list[Span]:
    """The span of an answer; without `</think>`, where its thoughts are cut."""
    if not message.get("thoughts_cut"):
        return [answer]
    close = text.find(END_THINK, answer.start, answer.end)
    if close < 0:
        raise ValueError(f"message {turn}: thoughts_cut is true, but the answer contains no {END_THINK}")
    return [answer._replace(end=close), answer._replace(start=close + len(END_THINK))]


def _locate_answers(template: ChatTemplate, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of its answers, located by rendering it up to each answer."""
    text, answers = template.render(messages, tools), []
    for turn in (turn for turn, message in enumerate(messages) if message["role"] == "assistant"):
        prompt = template.render(messages[:turn], tools, prompt=True)
        upto = text if turn == len(messages) - 1 else template.render(messages[: turn + 1], tools)
        if not (text.startswith(upto) and upto.startswith(prompt)):
            raise ValueError(
                f"message {turn}: the chat template renders the preceding messages differently once this answer "
                "follows, so the trained tokens are ambiguous; patch the template (notebook 01_patch_tokenizer)"
            )
        answers.append(Span(len(prompt), len(upto)))
    return text, answers


def _check_answer(message: dict, turn: int, answer: str, eos: str | None) -> int:
    """Length of `answer` including its EOS; every part of the message must occur in it."""
    parts = [message.get(name) for name in ("content", *REASONING)]
    parts += [call["function"]["name"] for call in message.get("tool_calls") or ()]
    if any(part and part.strip() not in answer for part in parts):
        raise ValueError(
            f"message {turn}: the chat template drops part of the answer, such as the chain of thought; "
            "patch the template (notebook 01_patch_tokenizer)"
        )
    length = len(answer.rstrip())  # some templates add a line break after EOS
    if not eos or not answer[:length].endswith(eos):
        raise ValueError(
            f"message {turn}: the chat template does not end the answer with {eos!r}; if another token ends it, set "
            "`eos` in notebook 01_patch_tokenizer to that"
        )
    return length


def _check_order(messages: list[dict], text: str, answers: list[Span]) -> None:
    """Check that the text contains every message, in order; `answers` are the spans of the assistant's messages.

    R1's template, for example, keeps only the last of several system messages and moves it to the front.
    """
    remaining, position = iter([*answers, Span(len(text), len(text))]), 0
    following = next(remaining)
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            if following.start < position:
                raise ValueError(misplaced(turn, message))
            position, following = following.end, next(remaining)
            continue
        end = end_of_content(text, message, position, following.start)
        if end is None:
            raise ValueError(misplaced(turn, message))
        position = end


def end_of_content(text: str, message: dict, position: int, before: int | None = None) -> int | None:
    """Where the content of a message ends between two positions of a text; None if it does not occur.

    Llama's template writes tool results as JSON strings.
    """
    content = (message.get("content") or "").strip()
    forms = [content] + [json.dumps(content, ensure_ascii=False)] * (message["role"] == "tool")
    found = ((text.find(form, position, before), len(form)) for form in forms)
    return next((start + length for start, length in found if start >= 0), None)


def misplaced(turn: int, message: dict) -> str:
    """The error for a message that the rendered text lacks or has in the wrong place."""
    return (
        f"message {turn} ({message['role']}): the chat template drops, changes or moves it: "
        f"{message.get('content')!r:.60} is not found between the preceding and the following message"
    )
