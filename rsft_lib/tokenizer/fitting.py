"""Fit the training template of a format to a model: what its own chat template writes for sample chats is kept."""

import json
import re
from itertools import product

from rsft_lib.tokenizer.chat import ChatTemplate
from rsft_lib.tokenizer.formats import FORMATS, R1_CHAT_TEMPLATE, Format, Shape, TrainingTemplate, parse
from rsft_lib.tokenizer.sample_chats import QUESTION, RESULT, SAMPLES, SYSTEM, TOOLS, OwnTexts, own_texts, render

EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")  # some templates write it into answers
# What precedes the first question, and the samples that show it: some templates treat a last message differently.
FORMS = {
    "plain": ("first question", "plain"), "system": ("system and question", "system"),
    "plain tools": ("tools and question", "tools"), "system tools": ("system, tools and question", "system and tools"),
}  # fmt: skip
# Samples in which no template has a reason to differ, in one form at least: Mistral's drops the system message of a
# conversation that an answer ends.
SAME = (("plain",), ("system", "system and question"), ("two turns",), ("spaces",))
CALLS = ("tool call", "tool call, arguments as text", "tool call without content")

BY_HAND = (
    "Write a training template by hand and set `template` to the file. It must keep answers complete, have "
    "{% generation %} around the assistant's output including EOS, and end the generation prompt where an answer "
    "begins; the contract in notebook 01 checks it"
)


def training_template(own: ChatTemplate, trailing_newline: bool = False) -> tuple[TrainingTemplate, OwnTexts | None]:
    """The training template for a model, and what its own chat template writes (None if that is one of ours).

    Args:
        trailing_newline: R1 only: add a newline after `<｜Assistant｜>`, in prompts and training text alike, for models
            trained on such prompts (the original hand-edited template has it, and RL on it makes a model expect it).

    Raises:
        ValueError: the format is unknown, or the template writes a chat without thoughts and tools in another way.
    """
    fitted, texts = parse(own.source), None
    if fitted is None:
        texts = own_texts(own, trusted=own.source == R1_CHAT_TEMPLATE)
        fitted = _fit(texts, own.special_tokens)
    if fitted.format is FORMATS[0]:
        return fitted.having(**FORMATS[0].shapes[trailing_newline].settings), texts
    if trailing_newline:
        raise ValueError(f"trailing_newline is for the R1 format; this chat template is of {fitted.format.name}")
    return fitted, texts


def _fit(own: OwnTexts, special_tokens: dict) -> TrainingTemplate:
    format, shape = _recognise(own)
    settings: dict = {
        **shape.settings, "end": shape.end, "trim": f" {QUESTION} \n" not in own.texts.get("spaces", f" {QUESTION} \n"),
        "begin": {}, "opened": [], "tools": "", "between_tools": "", "calls": "", "results": "", "before_call": "\n",
    }  # fmt: skip
    fitted = TrainingTemplate(format, settings, special_tokens)
    fitted = fitted.having(**_tools(fitted, own))
    fitted = fitted.having(**_begin(fitted, own, shape))
    fitted = fitted.having(**_calls(fitted, own))
    _require_same(fitted, own)
    return fitted


def _recognise(own: OwnTexts) -> tuple[Format, Shape]:
    text = own.texts.get("plain", "")
    if not text:
        raise ValueError(
            f"the model's own chat template fails on a question and its answer: {own.errors['plain']}. {BY_HAND}"
        )
    # Some templates end an answer only where another turn follows.
    text = without_empty_thoughts(text + own.texts.get("two turns", ""))
    for format in FORMATS:
        for shape in format.shapes:
            if shape.turn in text:
                return format, shape
    known = ", ".join(f"{format.name} ({format.models})" for format in FORMATS)
    raise ValueError(
        f"unknown chat format: a question and its answer become {own.texts['plain']!r:.300}; known are {known}. "
        f"{BY_HAND}"
    )


def without_empty_thoughts(text: str) -> str:
    """The text without the empty chains of thought that some templates write into answers."""
    return EMPTY_THOUGHT.sub("", text)


def _before_question(own: OwnTexts, form: str) -> str:
    """What precedes the first question; '' if the template fails on such chats."""
    text = next((own.texts[name] for name in FORMS[form] if name in own.texts), "")
    return text[: max(0, text.find(QUESTION))]


def _tools(fitted: TrainingTemplate, own: OwnTexts) -> dict:
    """The settings under which the tools of a chat are written as by the model's own template."""
    text = _before_question(own, "plain tools") or _before_question(own, "system tools")
    for style, between in fitted.format.tools:
        settings = {"tools": style, "between_tools": between}
        if _tools_text(fitted.having(**settings)) in text:
            return settings
    return {}


def _tools_text(fitted: TrainingTemplate) -> str:
    """The tools of the sample chats alone."""
    return fitted.having(begin={"plain tools": ["", "tools", ""]}).chat_template.render([], TOOLS)


def _begin(fitted: TrainingTemplate, own: OwnTexts, shape: Shape) -> dict:
    """What the model's own template writes before the first question, with and without system message and tools."""
    begin, opened = {}, []
    for form in FORMS:
        text, given = _before_question(own, form), {}
        if "system" in form:
            given["system"] = SYSTEM["content"]
        if "tools" in form:
            given["tools"] = _tools_text(fitted) if fitted.settings["tools"] else "not written"
        if not text or any(part not in text for part in given.values()):
            continue
        if not text.endswith(shape.user):
            opened.append(form)
        begin[form] = _pieces(text.removesuffix(shape.user), given)
    if fitted.format.tools_header and "plain tools" not in begin:
        style = dict(zip(("tools", "between_tools"), fitted.format.tools[0], strict=True))
        return {"begin": begin | _with_tools_header(begin, fitted.format.tools_header), "opened": opened} | style
    return {"begin": begin, "opened": opened}


def _pieces(text: str, given: dict[str, str]) -> list[str]:
    """`text` cut at the strings of `given`: literal strings at even places, the names of `given` at odd ones."""
    pieces = []
    for kind in sorted(given, key=lambda kind: text.find(given[kind])):
        before, _, text = text.partition(given[kind])
        pieces += [before, kind]
    return [*pieces, text]


def _with_tools_header(begin: dict, header: str) -> dict:
    forms = {"plain tools": [*begin["plain"][:-1], begin["plain"][-1] + header, "tools", ""]}
    if "system" in begin:
        forms["system tools"] = [*begin["system"][:-1], f"{begin['system'][-1]}\n\n{header}", "tools", ""]
    return forms


def _calls(fitted: TrainingTemplate, own: OwnTexts) -> dict:
    """The ways to write tool calls and results that occur in the texts of the model's own template."""
    texts = [own.texts[name] for name in CALLS if name in own.texts]
    ways = [
        {"calls": calls, "results": results} for calls, results in product(fitted.format.calls, fitted.format.results)
    ]
    for closed in (True, False):  # Hermes closes a group of results differently in prompts and in training text
        for way in ways:
            parts = _call_and_result(fitted.having(**way), closed)
            if any(all(part in text for part in parts) for text in texts):
                spaced = "\n\n<tool_call>" in own.texts.get("tool call with text", "")
                return way | {"before_call": "\n\n" if spaced else "\n"}
    return ways[0] if fitted.format.tools_header else {}


def _call_and_result(fitted: TrainingTemplate, closed: bool) -> tuple[str, str]:
    """The text of a tool call, and of its result, with or without what closes it."""
    text, (call, answer) = fitted.chat_template.render_marked([SAMPLES["tool call"].messages])[0]
    result = text[call.end : answer.start]
    if not closed:
        written = RESULT if RESULT in result else json.dumps(RESULT)
        result = result[: result.index(written) + len(written)]
    return text[call.start : call.end].removesuffix(fitted.settings["end"]), result.strip()


def _require_same(fitted: TrainingTemplate, own: OwnTexts) -> None:
    """Refuse a template that writes a chat without thoughts and tools differently, up to its last answer.

    After that answer some templates write no EOS or more than that, which no prompt contains.
    """
    for names in SAME:
        pairs = [
            (_up_to_answer(own.texts[name], name), _up_to_answer(render(fitted.chat_template, SAMPLES[name]), name))
            for name in names
            if name in own.texts and not ("system" in name and "system" not in fitted.settings["begin"])
        ]
        if pairs and all(expected != found for expected, found in pairs):
            expected, found = pairs[0]
            raise ValueError(
                f"the chat template is like that of {fitted.format.name}, but writes the sample chat {names[0]!r} as "
                f"{expected!r:.400}, where the training template would write {found!r:.400}. {BY_HAND}"
            )


def _up_to_answer(text: str, sample: str) -> str:
    """The text of a sample chat up to the end of its last answer; all of it if it ends with a question."""
    last = SAMPLES[sample].messages[-1]
    text = without_empty_thoughts(text).rstrip()
    return text[: text.rfind(last["content"]) + len(last["content"])] if last["role"] == "assistant" else text
