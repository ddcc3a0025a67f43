"""Conversations as token ids with a loss mask, and the chat template that this needs."""

from dataclasses import dataclass

THINK, END_THINK, SHORT = "<think>", "</think>", "<short>"
MODES = {"think": THINK, "short": SHORT}

STRIPS_THINKING = "content.split('</think>')[-1]"
KEEPS_THINKING = "content"
STOCK_PROMPT_END = "<｜Assistant｜><think>\\n"
PROMPT_END = "<｜Assistant｜>"


@dataclass(frozen=True)
class Encoded:
    """A conversation: `ids` and `loss_mask` have one entry per token; 1 marks the tokens that are trained."""

    ids: list[int]
    loss_mask: list[int]


def patch_template(template: str) -> str:
    """The R1 chat template with two edits; one that has them already comes back as it is.

    The chain of thought of an assistant turn is kept, and the generation prompt ends right after
    `<｜Assistant｜>`, so that the model itself writes the control token it was trained to write there.

    Raises:
        ValueError: this is not R1's template.
    """
    if STOCK_PROMPT_END not in template and f"'{PROMPT_END}'" not in template:
        raise ValueError(
            f"the chat template has no generation prompt {PROMPT_END!r}: only R1's template can be patched"
        )
    return template.replace(STRIPS_THINKING, KEEPS_THINKING).replace(STOCK_PROMPT_END, PROMPT_END)


def encode(tokenizer, messages: list[dict]) -> Encoded:
    """Token ids of a conversation and which of them are trained: what the assistant writes, and its EOS.

        text   <bos> <｜User｜> 2 + 2 ? <｜Assistant｜> <short> 4 <eos>
        mask     0      0     0 0 0 0       0          1    1   1

    The whole text is rendered and tokenized once. Where an assistant turn begins is found by rendering the
    messages before it with the generation prompt, which must be how the whole text begins.

    Raises:
        ValueError: the template changes or drops part of an answer, an answer does not end with EOS, or a
            token lies half inside an answer.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = [_span(tokenizer, messages, turn, text) for turn, m in enumerate(messages) if m["role"] == "assistant"]
    if not spans:
        raise ValueError("the conversation has no assistant message to train on")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [_inside(start, end, spans, text) for start, end in encoding["offset_mapping"]]
    return Encoded(encoding["input_ids"], mask)


def prompt_ids(tokenizer, messages: list[dict], mode: str | None = None) -> list[int]:
    """Token ids to generate from: the conversation, the assistant's header and the mode's control token.

    Args:
        mode: 'think' or 'short'; None leaves the choice to the model.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + (MODES[mode] if mode else ""), add_special_tokens=False)["input_ids"]


def _span(tokenizer, messages: list[dict], turn: int, text: str) -> tuple[int, int]:
    """First and one past the last character of assistant message `turn` in `text`, EOS included."""
    prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
    upto = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
    if not (text.startswith(upto) and upto.startswith(prompt)):
        raise ValueError(
            f"message {turn}: the chat template renders the conversation before this answer differently once the "
            "answer is there, so what to train cannot be told; patch the template (notebook 01_patch_tokenizer)"
        )
    answer = upto[len(prompt) :]
    if messages[turn].get("content") and messages[turn]["content"].strip() not in answer:
        raise ValueError(
            f"message {turn}: the chat template drops part of the answer, such as the chain of thought; "
            "patch the template (notebook 01_patch_tokenizer)"
        )
    if not answer.endswith(tokenizer.eos_token):
        raise ValueError(f"message {turn}: the chat template does not end the answer with {tokenizer.eos_token!r}")
    return len(prompt), len(upto)


def _inside(start: int, end: int, spans: list[tuple[int, int]], text: str) -> int:
    for first, last in spans:
        if first <= start and end <= last:
            return 1
        if start < last and end > first:
            raise ValueError(f"token {text[start:end]!r} at character {start} lies across the edge of an answer")
    return 0
