"""What a training template writes differently from the model's own chat template, on sample chats, and why."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rsft_lib.tokenizer.fitting import CALLS, EMPTY_THOUGHT
from rsft_lib.tokenizer.formats import TrainingTemplate
from rsft_lib.tokenizer.sample_chats import DATE, SAMPLES, SHOWN, SYSTEM, TOOLS, OwnTexts, render

TOOL_DESCRIPTION = TOOLS[0]["function"]["description"]


@dataclass(frozen=True)
class Texts:
    """The texts of one sample chat; `end` is the token that ends an answer, `header` begins one."""

    own: str
    ours: str
    end: str
    header: str

    def adds(self, part: str) -> bool:
        """Whether the training template writes `part` more often."""
        return self.ours.count(part) > self.own.count(part)

    def continues(self) -> bool:
        """Whether the model's own template writes the same text and then more."""
        ours, own = self.ours.rstrip(), self.own.rstrip()
        return own.startswith(ours) and own != ours


REASONS: tuple[tuple[str, Callable[[Texts], bool]], ...] = (
    ("the chain of thought is kept in every turn", lambda texts: texts.adds("Two and two.")),
    (
        "no empty chain of thought is added",
        lambda texts: len(EMPTY_THOUGHT.findall(texts.own)) > len(EMPTY_THOUGHT.findall(texts.ours)),
    ),
    ("the tools are listed: a model should call only those in its prompt", lambda texts: texts.adds(TOOL_DESCRIPTION)),
    ("the system message stands before the first question at every turn", lambda texts: texts.adds(SYSTEM["content"])),
    ("a tool call is kept", lambda texts: texts.adds("[2, 2]")),
    ("the text beside a tool call is kept", lambda texts: texts.adds("I add them.")),
    ("every answer and tool call ends with EOS", lambda texts: texts.adds(texts.end)),
    (
        "nothing follows the end of the last answer",
        lambda texts: texts.ours.rstrip().endswith(texts.end) and texts.continues(),
    ),
    ("every answer has the assistant's header, also after tool results", lambda texts: texts.adds(texts.header)),
    (
        "the prompt ends where the answer begins: the model writes the control token",
        lambda texts: not texts.ours.rstrip().endswith(texts.end) and texts.own.startswith(texts.ours),
    ),
    (
        "white space after an answer is the same in prompts and training text",
        lambda texts: "".join(texts.own.split()) == "".join(texts.ours.split()),
    ),
)


def changes(template: TrainingTemplate, own: OwnTexts | None) -> tuple[dict[str, str], str]:
    """Sample chat -> why its text changes, and a unified diff of the texts.

    Args:
        own: the texts of the model's own template; None if that was a training template, so that nothing changes.
    """
    reasons: dict[str, str] = {}
    diffs: list[str] = []
    if not own:
        return reasons, ""
    if own.dated:
        reasons["date"] = f"fixed at {DATE:%d %B %Y}: by the clock, serving would differ from training"
    for name in SHOWN:
        before, (after, error) = _own_text(own, name), _text_or_error(template, name)
        if before != after:
            reasons[name] = _reason(template, before, own.errors.get(name, ""), after, error)
            diffs += _diff(name, before or "", after or "")
    return reasons, "\n".join(diffs)


def _diff(name: str, before: str, after: str) -> Iterator[str]:
    titles = (f"{name}, before", f"{name}, after")
    return difflib.unified_diff(before.split("\n"), after.split("\n"), *titles, n=1, lineterm="")


def _own_text(own: OwnTexts, name: str) -> str | None:
    """The text of a sample; of a tool call, in the form that the template accepts."""
    forms = [own.texts[form] for form in (CALLS if name == CALLS[0] else (name,)) if form in own.texts]
    return next((text for text in forms if "[2, 2]" in text), forms[0] if forms else None)


def _text_or_error(template: TrainingTemplate, name: str) -> tuple[str | None, str]:
    try:
        return render(template.chat_template, SAMPLES[name]), ""
    except ValueError as error:
        return None, str(error.__cause__ or error)


def _reason(template: TrainingTemplate, before: str | None, own_error: str, after: str | None, error: str) -> str:
    """Why a text changes."""
    if after is None:
        return f"refused: {error}"
    if before is None:
        return f"the model's own template fails on it: {own_error}"
    end = template.settings["end"]
    shape = next(shape for shape in template.format.shapes if shape.end == end)
    texts = Texts(before, after, end, shape.between.removeprefix(end).strip())
    found = [why for why, holds in REASONS if holds(texts)]
    return "; ".join(found) or f"written as in the {template.format.name} format; see the difference"
