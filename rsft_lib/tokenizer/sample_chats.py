"""Sample chats, and their text under a model's own chat template.

    python -m rsft_lib.tokenizer.sample_chats   reads {"template": ..., "special_tokens": ...} and prints `OwnTexts`

A template is a program from an untrusted source: it is rendered by this command, with limits on time and memory.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime

from rsft_lib.common.sandbox import SECONDS, end_after, limited, run_with_limits
from rsft_lib.tokenizer.chat import ChatTemplate
from rsft_lib.tokenizer.template_clock import clock_at

# A template that writes the date is rendered at the date that Llama's templates write if they have no clock.
DATE = datetime(2024, 7, 26)
ANOTHER_DATE = datetime(2031, 12, 5, 23, 45)
LONGEST = 100_000  # characters of a sample chat

SYSTEM = {"role": "system", "content": "Answer as briefly as you can."}
QUESTION, ANSWER = "How many are 2 + 2?", "They are four."
USER = {"role": "user", "content": QUESTION}
PLAIN = {"role": "assistant", "content": ANSWER}
NEXT = [{"role": "user", "content": "And 3 + 3?"}, {"role": "assistant", "content": "Six of them."}]
THOUGHT = "<think>\nTwo and two.\n</think>\n\n"
THINKING = {"role": "assistant", "content": THOUGHT + ANSWER}
REASONED = {"role": "assistant", "content": ANSWER, "reasoning_content": "Two and two."}
RESULT = '{"sum": 4}'


def tool(name: str) -> dict:
    """The description of a function with one parameter."""
    parameters = {"type": "object", "properties": {"numbers": {"type": "array", "description": "What to add."}}}
    return {"type": "function", "function": {"name": name, "description": f"To {name} them.", "parameters": parameters}}


def calling(content: str | None, arguments: dict | str, count: int = 1) -> list[dict]:
    """A question, tool calls, their results, and an answer."""
    function = {"name": "add", "arguments": arguments}
    ids = [f"call{number:05d}" for number in range(count)]
    calls = [{"type": "function", "id": name, "function": function} for name in ids]
    results = [{"role": "tool", "name": "add", "tool_call_id": name, "content": RESULT} for name in ids]
    return [USER, {"role": "assistant", "content": content, "tool_calls": calls}, *results, PLAIN]


@dataclass(frozen=True)
class Sample:
    """A chat, with the tools that it offers, rendered as training text or as a prompt."""

    messages: list[dict]
    tools: list[dict] = field(default_factory=list)
    prompt: bool = False


ARGUMENTS: dict = {"numbers": [2, 2]}
TOOLS = [tool("add"), tool("multiply")]
SAMPLES = {
    "plain": Sample([USER, PLAIN]),
    "system": Sample([SYSTEM, USER, PLAIN]),
    "two turns": Sample([USER, PLAIN, *NEXT]),
    "spaces": Sample([{"role": "user", "content": f" {QUESTION} \n"}, PLAIN]),
    "prompt": Sample([USER], prompt=True),
    "prompt of a second turn": Sample([USER, PLAIN, NEXT[0]], prompt=True),
    "thoughts in two turns": Sample([USER, THINKING, NEXT[0], {**NEXT[1], "content": THOUGHT + NEXT[1]["content"]}]),
    "thoughts in reasoning_content": Sample([USER, REASONED, *NEXT]),
    "tools": Sample([USER, PLAIN], TOOLS),
    "system and tools": Sample([SYSTEM, USER, PLAIN], TOOLS),
    "tool call": Sample(calling("", ARGUMENTS)),
    "tool call with text": Sample(calling("I add them.", ARGUMENTS)),
    "two tool calls": Sample(calling("", ARGUMENTS, 2)),
    # Other forms of the same, which some templates require.
    "first question": Sample([USER]),
    "system and question": Sample([SYSTEM, USER]),
    "tools and question": Sample([USER], TOOLS),
    "system, tools and question": Sample([SYSTEM, USER], TOOLS),
    "tool call, arguments as text": Sample(calling(None, json.dumps(ARGUMENTS))),
    "tool call without content": Sample(calling(None, ARGUMENTS)),
}
SHOWN = list(SAMPLES)[:13]  # those that notebook 01 compares


@dataclass(frozen=True)
class OwnTexts:
    """The text of each sample under a template, or the error if the template rejects it."""

    texts: dict[str, str]
    errors: dict[str, str]
    dated: bool  # whether the text depends on the date


def own_texts(template: ChatTemplate, trusted: bool = False) -> OwnTexts:
    """The texts of `SAMPLES`, rendered in a process with limits unless the template is trusted.

    Raises:
        ValueError: rendering exceeds a limit.
    """
    if trusted:
        return _own_texts(template)
    given = json.dumps({"template": template.source, "special_tokens": template.special_tokens}, default=str)
    try:
        return OwnTexts(**json.loads(run_with_limits("rsft_lib.tokenizer.sample_chats", stdin=given)))
    except ValueError as error:
        raise ValueError(f"the model's own chat template cannot be rendered: {error}") from None


def render(template: ChatTemplate, sample: Sample) -> str:
    """The text of a sample; `ValueError` if the template fails on it."""
    return template.render(sample.messages, sample.tools or None, sample.prompt)


def _own_texts(template: ChatTemplate) -> OwnTexts:
    texts, errors = _render_all(template, DATE)
    return OwnTexts(texts, errors, dated=_render_all(template, ANOTHER_DATE)[0] != texts)


def _render_all(template: ChatTemplate, moment: datetime) -> tuple[dict[str, str], dict[str, str]]:
    texts, errors = {}, {}
    with clock_at(moment):
        for name, sample in SAMPLES.items():
            try:
                texts[name] = render(template, sample)
            except ValueError as error:
                errors[name] = str(error)[:300]
                continue
            if len(texts[name]) > LONGEST:
                raise ValueError(f"a short chat becomes {len(texts[name]):,} characters")
    return texts, errors


def main() -> None:
    given = json.load(sys.stdin)
    template = ChatTemplate(given["template"], given["special_tokens"])
    end_after(2 * SECONDS)
    try:
        with limited("rendering the template"):
            own = _own_texts(template)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(own)))


if __name__ == "__main__":
    main()
