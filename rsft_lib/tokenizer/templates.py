"""What the kit knows of chat templates: the stock ones it makes ready for training, and the edits of each.

Patched templates mark what the assistant writes with the tag `{% generation %}`. transformers, and what renders with it
(vLLM, other trainers), read the loss mask from it. It writes nothing: for an engine of plain Jinja, which does not know
it, take the tag and `{% endgeneration %}` out, and the text is the same.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

# DeepSeek-R1's stock template, MIT licence: https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
R1_CHAT_TEMPLATE = (Path(__file__).parent / "r1_chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Edit:
    """What stands from `start` up to the next `end`, or to the end of the template, becomes `text`."""

    name: str
    why: str
    start: str
    end: str
    text: str
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """The templates that contain every one of `marks`, and how they are edited, or why they are not."""

    name: str
    marks: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    refusal: str = ""


def patch_template(template: str, trailing_newline: bool = False) -> tuple[str, list[Edit]]:
    """The template made ready for training, and the edits that changed it; one that is ready comes back as it is.

    An edit puts the same text in place of the same part whatever stands there, so a template that somebody edited
    before (the original's users, for one) ends as the stock one does.

    Args:
        trailing_newline: R1 only: a newline follows `<｜Assistant｜>`, in prompts and in training text alike. The
            original's prompts have it; a model trained further on them (by RL, for one) expects it.

    Raises:
        ValueError: the template is of no known family, of one that cannot be edited, or lacks a part of its family.
    """
    family = recognise(template)
    if trailing_newline and family is not R1:
        raise ValueError(f"trailing_newline is for R1's template; this is that of {family.name}")
    changed = []
    for edit in (R1_WITH_NEWLINE if trailing_newline else family).edits:
        edited = _apply(edit, template, family)
        changed += [edit] if edited != template else []
        template = edited
    return template, changed


def recognise(template: str) -> Family:
    """The family of a template.

    Raises:
        ValueError: there is none, or one that cannot be used.
    """
    for family in FAMILIES:
        if all(mark in template for mark in family.marks):
            if family.refusal:
                raise ValueError(f"the chat template is that of {family.name}, which {family.refusal}. {BY_HAND}")
            return family
    known = ", ".join(family.name for family in FAMILIES if family.edits)
    raise ValueError(f"the chat template is none that this kit can edit, which are those of {known}. {BY_HAND}")


def is_ours(template) -> bool:
    """Whether this very text has been read by whoever made the kit, so that it may run without limits."""
    return isinstance(template, str) and template in OURS


def template_diff(before: str, after: str) -> str:
    """A unified diff of two templates, one statement a line."""
    lines = [_statements(text) for text in (before, after)]
    return "\n".join(difflib.unified_diff(*lines, "before", "after", lineterm="", n=1))


def _apply(edit: Edit, template: str, family: Family) -> str:
    start = template.find(edit.start)
    if start < 0 and edit.optional:
        return template
    stop = template.find(edit.end, start + len(edit.start)) if edit.end else len(template)
    if start < 0 or stop < 0:
        raise ValueError(
            f"the chat template looks like that of {family.name}, but the edit {edit.name!r} does not find "
            f"{edit.start if start < 0 else edit.end!r} in it. {BY_HAND}"
        )
    there = template[start:stop].strip() == edit.text.strip()
    return template if there else template[:start] + edit.text + template[stop:]


def _statements(template: str) -> list[str]:
    for mark in ("{%", "{{"):
        template = template.replace(mark, f"\n{mark}")
    return [line.strip() for line in template.splitlines() if line.strip()]


BY_HAND = (
    "Edit it by hand into a file and give that as `template`: answers whole, {% generation %} around what the "
    "assistant writes, its end token included, a generation prompt that ends where an answer begins. "
    "The contract of notebook 01 checks it"
)

MARKED = "what the assistant writes is marked with {% generation %}, so that the loss mask need not be guessed"

# A content that is no text, such as a list of parts, should be an error and not printed as Python: hence '' + content.
ANSWER = r"""
    {%- generation %}
    {%- if message.reasoning_content and '</think>' not in (message.content or '') %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {%- if message.content %}
        {{- '' + message.content }}
    {%- endif %}"""

R1_TOOLS = r"""{{ns.system_prompt}}{%- if tools %}
    {{- ('\n\n' if ns.system_prompt else '') + '## Tools\n' }}
    {%- for tool in tools %}
        {{- '\n' + (tool.function or tool) | tojson }}
    {%- endfor %}
{%- endif %}"""

R1_USER = r"""{%- if message['role'] == 'user' %}
    {{- '<｜tool▁outputs▁end｜>' if ns.is_tool else '' }}
    {%- set ns.is_tool = false %}
    {{- '<｜User｜>' + message['content'] }}
{%- endif %}"""

R1_ASSISTANT = (
    r"""{%- if message['role'] == 'assistant' %}
    {{- ('<｜tool▁outputs▁end｜>' if ns.is_tool else '') + 'HEADER' }}
    {%- set ns.is_tool = false %}"""
    + ANSWER
    + r"""
    {%- for tool in message.tool_calls or [] %}
        {%- set arguments = tool.function.arguments %}
        {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
        {{- '<｜tool▁call▁begin｜>' + (tool.type or 'function') + '<｜tool▁sep｜>' + tool.function.name }}
        {{- '\n```json\n' + (arguments if arguments is string else arguments | tojson) + '\n```' }}
        {{- '<｜tool▁call▁end｜>' + ('<｜tool▁calls▁end｜>' if loop.last else '') }}
    {%- endfor %}
    {{- '<｜end▁of▁sentence｜>' }}
    {%- endgeneration %}
{%- endif %}"""
)

R1_TOOL = r"""{%- if message['role'] == 'tool' %}
    {{- '\n' if ns.is_tool else '<｜tool▁outputs▁begin｜>' }}
    {%- set ns.is_tool = true %}
    {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
{%- endif %}"""

R1_PROMPT = "{% if add_generation_prompt %}{{'HEADER'}}{% endif %}"

QWEN_ASSISTANT = (
    r"""{%- elif message.role == "assistant" %}
    {{- '<|im_start|>assistant\n' }}"""
    + ANSWER
    + r"""
    {%- for tool_call in message.tool_calls or [] %}
        {%- set call = tool_call.function or tool_call %}
        {{- '\n' if message.content or not loop.first else '' }}
        {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
        {{- (call.arguments if call.arguments is string else call.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
    {%- endgeneration %}
    {{- '\n' }}
    """
)

QWEN_PROMPT = r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def _r1(header: str) -> Family:
    """R1's templates, with `header` before every answer.

    After tool results the stock template has none. Their end is no token of the R1-Distill vocabularies, so its last
    character would join the first of an answer in one token, and a prompt would not be how its training text begins.
    """
    edits = (
        Edit(
            "tools",
            "the stock template drops the tools of a conversation; a model should call only what it was told of",
            "{{ns.system_prompt}}", "{%- for message", R1_TOOLS,
        ),
        Edit(
            "user turn",
            "tool results before it are closed, as the generation prompt after them does",
            "{%- if message['role'] == 'user'", "{%- if message['role'] == 'assistant'", R1_USER,
        ),
        Edit(
            "assistant turn",
            "the chain of thought stays; tool calls end as answers do; every answer has the header, after tool results "
            f"too; arguments may be text or an object; {MARKED}",
            "{%- if message['role'] == 'assistant'", "{%- if message['role'] == 'tool'",
            R1_ASSISTANT.replace("HEADER", header),
        ),
        Edit(
            "tool results",
            "every group of them has its beginning; the stock template writes it once a conversation",
            "{%- if message['role'] == 'tool'", "{%- endfor -%}", R1_TOOL,
        ),
        Edit(
            "generation prompt",
            "it ends where the answer begins: the control token is for the model to write",
            "{% if add_generation_prompt", "", R1_PROMPT.replace("HEADER", header),
        ),
    )  # fmt: skip
    return Family("R1", ("<｜Assistant｜>", "<｜User｜>", "{{ns.system_prompt}}"), edits)


R1, R1_WITH_NEWLINE = _r1("<｜Assistant｜>"), _r1(r"<｜Assistant｜>\n")

QWEN = Family(
    "Qwen2.5 and Qwen3",
    ("<|im_start|>", "<args-json-object>"),
    (
        Edit(
            "own branch",
            "answers leave the branch that writes the user's turns too",
            ' or (message.role == "assistant" and not message.tool_calls)', " %}", "", optional=True,
        ),
        Edit(
            "assistant turn",
            "the chain of thought stays in every turn, and none is made up where there was none; arguments may be "
            f"text or an object; {MARKED}",
            '{%- elif message.role == "assistant" %}', '{%- elif message.role == "tool" %}', QWEN_ASSISTANT,
        ),
        Edit(
            "generation prompt",
            "it ends where the answer begins: a control token takes the place of enable_thinking",
            "{%- if add_generation_prompt %}", "", QWEN_PROMPT,
        ),
    ),
)  # fmt: skip

LLAMA = Family(
    "Llama-3",
    ("<|start_header_id|>",),
    refusal="trims answers, and from 3.1 on writes today's date into the prompt and refuses more than one tool call",
)

FAMILIES = (R1, QWEN, LLAMA)
OURS = {R1_CHAT_TEMPLATE, *(patch_template(R1_CHAT_TEMPLATE, newline)[0] for newline in (False, True))}
