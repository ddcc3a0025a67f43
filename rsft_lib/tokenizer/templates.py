"""The chat templates that the kit can edit for training, and the edits.

Patched templates mark the assistant's output with `{% generation %}`, from which transformers and tools that render
with it (vLLM, other trainers) compute the loss mask. The tag does not change the text: for a plain Jinja engine, which
does not know it, remove it and `{% endgeneration %}`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

# DeepSeek-R1's stock template, MIT licence: https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
R1_CHAT_TEMPLATE = (Path(__file__).parent / "r1_chat_template.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Edit:
    """Replaces the template from `start` up to the next `end`, or to its own end if that is empty, by `text`."""

    name: str
    why: str
    start: str
    end: str
    text: str
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """Templates that contain all of `marks`, with their edits, or with the reason why they cannot be used."""

    name: str
    marks: tuple[str, ...]
    edits: tuple[Edit, ...] = ()
    refusal: str = ""


def patch_template(template: str, trailing_newline: bool = False) -> tuple[str, list[Edit]]:
    """The template prepared for training, and the edits that changed it; a prepared template is returned unchanged.

    An edit replaces a whole section whatever its content, so a template that was edited by hand before gives the same
    result as the stock one.

    Args:
        trailing_newline: R1 only: add a newline after `<｜Assistant｜>`, in prompts and training text alike, for models
            trained on such prompts (the original hand-edited template has it, and RL on it makes a model expect it).

    Raises:
        ValueError: the template's family is unknown or cannot be edited, or a section to edit is missing.
    """
    family = recognise(template)
    if trailing_newline and family is not R1:
        raise ValueError(f"trailing_newline is for R1's template; this template is of family {family.name}")
    changed = []
    for edit in (R1_WITH_NEWLINE if trailing_newline else family).edits:
        edited = _apply(edit, template, family)
        changed += [edit] if edited != template else []
        template = edited
    return template, changed


def recognise(template: str) -> Family:
    """The family of a template.

    Raises:
        ValueError: the family is unknown or cannot be used.
    """
    for family in FAMILIES:
        if all(mark in template for mark in family.marks):
            if family.refusal:
                raise ValueError(f"the chat template is that of {family.name}, which {family.refusal}. {BY_HAND}")
            return family
    known = ", ".join(family.name for family in FAMILIES if family.edits)
    raise ValueError(f"this kit cannot edit the chat template; it can edit those of {known}. {BY_HAND}")


def is_ours(template) -> bool:
    """Whether the template is one that this kit ships, so that it may be rendered without limits."""
    return isinstance(template, str) and template in OURS


def template_diff(before: str, after: str) -> str:
    """A unified diff of two templates, one Jinja statement per line."""
    old, new = _statements(before), _statements(after)
    return "\n".join(difflib.unified_diff(old, new, "before", "after", lineterm="", n=1))


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
    edited = template[start:stop].strip() == edit.text.strip()
    return template if edited else template[:start] + edit.text + template[stop:]


def _statements(template: str) -> list[str]:
    for mark in ("{%", "{{"):
        template = template.replace(mark, f"\n{mark}")
    return [line.strip() for line in template.splitlines() if line.strip()]


BY_HAND = (
    "Edit it by hand and set `template` to the file. It must keep answers complete, have {% generation %} around the "
    "assistant's output including EOS, and end the generation prompt where an answer begins; the contract in "
    "notebook 01 checks it"
)

MARKED = "the assistant's output is marked with {% generation %}, from which the loss mask is computed"

# '' + content makes a content that is not a string, such as a list of parts, an error instead of printing it as Python.
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

    The stock template has no header after tool results. Their end marker is not a token of the R1-Distill vocabularies,
    so a token could span its last and the answer's first character, and the prompt would not be a prefix of the
    training text.
    """
    edits = (
        Edit(
            "tools",
            "the stock template drops the tools of a conversation; a model should call only tools listed in its prompt",
            "{{ns.system_prompt}}", "{%- for message", R1_TOOLS,
        ),
        Edit(
            "user turn",
            "preceding tool results are closed, as before the generation prompt",
            "{%- if message['role'] == 'user'", "{%- if message['role'] == 'assistant'", R1_USER,
        ),
        Edit(
            "assistant turn",
            "the chain of thought is kept; tool calls end with EOS; every answer has the header, also after tool "
            f"results; arguments may be a string or an object; {MARKED}",
            "{%- if message['role'] == 'assistant'", "{%- if message['role'] == 'tool'",
            R1_ASSISTANT.replace("HEADER", header),
        ),
        Edit(
            "tool results",
            "every group of results has its opening token; the stock template writes it once per conversation",
            "{%- if message['role'] == 'tool'", "{%- endfor -%}", R1_TOOL,
        ),
        Edit(
            "generation prompt",
            "it ends where the answer begins: the model generates the control token",
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
            "answers no longer share the branch of user messages",
            ' or (message.role == "assistant" and not message.tool_calls)', " %}", "", optional=True,
        ),
        Edit(
            "assistant turn",
            "the chain of thought is kept in every turn, and no empty one is added; arguments may be a string or an "
            f"object; {MARKED}",
            '{%- elif message.role == "assistant" %}', '{%- elif message.role == "tool" %}', QWEN_ASSISTANT,
        ),
        Edit(
            "generation prompt",
            "it ends where the answer begins: a control token replaces enable_thinking",
            "{%- if add_generation_prompt %}", "", QWEN_PROMPT,
        ),
    ),
)  # fmt: skip

LLAMA = Family(
    "Llama-3",
    ("<|start_header_id|>",),
    refusal="trims answers and, since 3.1, writes today's date into the prompt and rejects more than one tool call",
)

FAMILIES = (R1, QWEN, LLAMA)
OURS = {R1_CHAT_TEMPLATE, *(patch_template(R1_CHAT_TEMPLATE, newline)[0] for newline in (False, True))}
