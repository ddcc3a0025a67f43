"""Chat formats: a training template for each, which replaces a model's own chat template.

A format is recognised by what the model's own template writes for sample chats: its turn markers and the token that
ends an answer. What models of one format write differently, such as a default system prompt or the list of tools, is
taken from the same texts and stands as `settings` in the first line of the training template.

Training templates mark the assistant's output with `{% generation %}`, from which transformers and tools that render
with it (vLLM, other trainers) compute the loss mask. The tag does not change the text: for a plain Jinja engine, which
does not know it, remove it and `{% endgeneration %}`.
"""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from rsft_lib.tokenizer.chat import ChatTemplate
from rsft_lib.tokenizer.sample_chats import ANSWER, QUESTION

FOLDER = Path(__file__).parent / "formats"
# DeepSeek-R1's stock template, MIT licence: https://huggingface.co/deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
R1_CHAT_TEMPLATE = (Path(__file__).parent / "r1_chat_template.jinja").read_text(encoding="utf-8")
INCLUDE = re.compile(r"\{% include '(\w+\.jinja)' %\}\n")
SETTINGS = re.compile(r"\{%- set settings = (\{.*\}) %\}\n")


@dataclass(frozen=True)
class Shape:
    """The text around a question and its answer: `user` question `between` answer `end` `after` (in settings)."""

    user: str
    between: str
    end: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def turn(self) -> str:
        return f"{self.user}{QUESTION}{self.between}{ANSWER}{self.end}{self.settings.get('after', '')}"


@dataclass(frozen=True)
class Format:
    """One row of the table: the training template `file`, and the shapes that a model's own template may have.

    `tools`, `calls` and `results` are the ways in which models of this format write tools (with what stands between
    two), tool calls and their results. `tools_header` is written where the model's own template drops the tools.
    """

    name: str
    models: str
    file: str
    shapes: tuple[Shape, ...]
    tools: tuple[tuple[str, str], ...] = ()
    calls: tuple[str, ...] = ()
    results: tuple[str, ...] = ()
    tools_header: str = ""


R1_END, CHATML_END, LLAMA_END, GRANITE_END = "<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"
ROLE_END = "<|end_header_id|>\n\n"
JSON_LINES = (("json", "\n"), ("function", "\n"))
# Spaces of Mistral's versions: before a question, before [/INST], before an answer and after EOS.
SPACES = [
    (" [INST] ", " [/INST]", " ", ""),
    *product(("[INST]", "[INST] "), ("[/INST]", " [/INST]"), ("", " "), (" ", "")),
]

FORMATS = (
    Format(
        "R1", "DeepSeek-R1-Distill and R1-0528", "r1.jinja",
        tuple(
            Shape("<｜User｜>", header, R1_END, {"header": header})
            for header in ("<｜Assistant｜>", "<｜Assistant｜>\n")
        ),
        (("function", "\n"),), ("r1",), ("r1",), "## Tools\n\n",
    ),
    Format(
        "ChatML", "Qwen2.5, QwQ, Qwen3 with 2507 and Coder, SmolLM2 and 3, Hermes", "chatml.jinja",
        (Shape("<|im_start|>user\n", f"{CHATML_END}\n<|im_start|>assistant\n", CHATML_END),),
        (*JSON_LINES, ("xml", "\n")), ("json", "xml"), ("user tagged", "user lines", "tool tagged", "plain", "user"),
    ),
    Format(
        "Llama-3", "Llama 3, 3.1, 3.2 and 3.3", "llama3.jinja",
        (
            Shape(
                f"<|start_header_id|>user{ROLE_END}", f"{LLAMA_END}<|start_header_id|>assistant{ROLE_END}", LLAMA_END
            ),
        ),
        (("indented", "\n\n"), ("json", "\n")), ("json",), ("quoted", "raw"),
    ),
    Format(
        "Mistral", "Mistral v0.1 to v0.3, Mixtral, Nemo, Ministral, Small", "mistral.jinja",
        tuple(
            Shape(user, end + space, "</s>", {"user": user, "user_end": end, "space": space, "after": after})
            for user, end, space, after in SPACES
        ),
        (("json", ", "),), ("list", "args", "id args"), ("content", "plain", "id"),
    ),
    Format(
        "Zephyr", "Zephyr, TinyLlama, Tulu 3, Falcon 3", "zephyr.jinja",
        tuple(
            Shape("<|user|>\n", f"{user_end}<|assistant|>\n", end, {"user_end": user_end})
            for end in ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|end|>")
            for user_end in (f"{end}\n", "\n")
        ),
    ),
    Format(
        "Granite", "Granite 3 and 4", "granite.jinja",
        (
            Shape(
                "<|start_of_role|>user<|end_of_role|>",
                f"{GRANITE_END}\n<|start_of_role|>assistant<|end_of_role|>", GRANITE_END,
            ),
        ),
        (("json", "\n"), ("indented list", "")), ("json",), ("user tagged",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class TrainingTemplate:
    """The training template of a format with the settings that fit a model.

    `settings` has `begin`: what precedes the first user message, by 'plain' or 'system' and, if there are tools,
    ' tools': literal strings and, at odd places, 'system' or 'tools'; `opened`: those of them that the text of a user
    message follows; and `calls`, empty if tool calls are refused.
    """

    format: Format
    settings: dict
    special_tokens: dict = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The Jinja template, complete in one string."""
        xml = "xml" in (self.settings.get("tools"), self.settings.get("calls"))
        body = _body(self.format.file, without="" if xml else "xml_tools.jinja")
        return f"{{%- set settings = {json.dumps(self.settings, ensure_ascii=False)} %}}\n{body}"

    @property
    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.source, self.special_tokens)

    def having(self, **settings) -> "TrainingTemplate":
        """This template with other settings."""
        return replace(self, settings=self.settings | settings)


def parse(template: str) -> TrainingTemplate | None:
    """The training template that a string is; None if it is another template."""
    if not (first := SETTINGS.match(template)):
        return None
    try:
        settings = json.loads(first[1])
    except ValueError:
        return None
    found = (TrainingTemplate(format, settings) for format in FORMATS)
    return next((one for one in found if one.source == template), None)


def is_ours(template) -> bool:
    """Whether this kit ships the template, so that it may be rendered without limits."""
    return isinstance(template, str) and (template == R1_CHAT_TEMPLATE or parse(template) is not None)


def _body(file: str, without: str = "") -> str:
    """A template with the parts that it includes, except the one called `without`."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    return INCLUDE.sub(lambda part: "" if part[1] == without else _body(part[1], without), text)
