"""Checks that a chat template keeps what a dialect writes, and that prompts contain what training leaves out."""

import numpy as np

from rsft_lib.common.check_table import Checks, Skip
from rsft_lib.tokenizer.chat import ChatTemplate, encode
from rsft_lib.tokenizer.dialect import MODE_NAMES, Dialect, modes_of, openings_of

QUESTION, THOUGHTS, ANSWER = "How many are 2 + 2?", "Two and two.", "Four."


def check_dialect(checks: Checks, tokenizer, dialect: Dialect) -> None:
    """Run the checks of `names_of(dialect)`."""
    for name in names_of(dialect):
        checks.run(name, DIALECT_CHECKS[name], tokenizer, dialect)


def names_of(dialect: Dialect) -> list[str]:
    """The checks of a dialect: none if control tokens alone make its modes, which other checks cover."""
    return [*DIALECT_CHECKS] if dialect.empty_block else []


def turns(dialect: Dialect) -> list[dict]:
    """A question and an answer in each mode, and again."""
    return [
        {"role": role, "content": text}
        for mode in [*dialect.forms] * 2
        for role, text in (
            ("user", dialect.ask(QUESTION, mode)),
            ("assistant", dialect.write(mode, THOUGHTS * (mode != dialect.empty_block), ANSWER)),
        )
    ]


def _switches_survive(tokenizer, dialect: Dialect) -> str:
    chat = turns(dialect)
    for end in range(1, len(chat), 2):
        text, position = ChatTemplate.of(tokenizer).render(chat[:end], prompt=True), 0
        for asked in (message["content"] for message in chat[:end:2]):
            found = text.find(asked, position)
            if found < 0:
                raise ValueError(f"the prompt {text!r} lacks {asked!r}: the switch does not reach the model")
            position = found + len(asked)
    return " and ".join(f"{form.switch.strip()!r}" for form in dialect.forms.values()) + " stay in the user's messages"


def _block_survives(tokenizer, dialect: Dialect) -> str:
    """Exactly the answers are trained, whether or not more turns follow, with or without their empty blocks."""
    chat = turns(dialect)
    for end in range(2, len(chat) + 1, 2):
        encoded = encode(tokenizer, chat[:end], context=dialect.context)
        trained = tokenizer.decode([i for i, kept in zip(encoded.ids, encoded.loss_mask, strict=True) if kept])
        answers = [message["content"].removeprefix(dialect.context or "\0") for message in chat[1:end:2]]
        if trained != (expected := "".join(answer + tokenizer.eos_token for answer in answers)):
            raise ValueError(f"the trained text is {trained!r}, expected {expected!r}")
    return f"the empty think block is verbatim in every turn and {'masked' if dialect.masked else 'trained'}"


def _modes_are_known(tokenizer, dialect: Dialect) -> str:
    for mode, answer in zip(dialect.forms, turns(dialect)[1::2], strict=False):
        encoded = encode(tokenizer, [{"role": "user", "content": QUESTION}, answer], context=dialect.context)
        first = np.array(encoded.loss_mask).argmax(keepdims=True)
        found = MODE_NAMES[modes_of(np.array(encoded.ids), first, openings_of(tokenizer, dialect))[0]]
        if found != mode:
            raise ValueError(f"the tokens of {answer['content']!r} are recognised as mode {found}, expected {mode}")
    return "the mode of an answer is known from its tokens"


def _hard_switch(tokenizer, dialect: Dialect) -> str:
    """`enable_thinking=False`, the hard switch of Qwen3's template, puts the empty think block into the prompt."""
    chat, block = [{"role": "user", "content": QUESTION}], dialect.forms[dialect.empty_block].opening
    plain, on, off = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **given)
        for given in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    if on == plain and off == plain + block:
        return "enable_thinking=False ends the prompt with the empty think block"
    if on == off == plain and not dialect.masked:
        raise Skip("the template ignores enable_thinking: ask with the soft switch")
    raise ValueError(
        f"with enable_thinking=False the prompt ends with {off[-40:]!r}, with True with {on[-40:]!r}, by default with "
        f"{plain[-40:]!r}; expected {block!r} after the default prompt with False and no difference with True. "
        + ("A masked block must come from the prompt: " if dialect.masked else "")
        + f"patch the tokenizer for the dialect {dialect.name} (notebook 01_patch_tokenizer)"
    )


DIALECT_CHECKS = {
    "soft switch survives": _switches_survive,
    "empty block survives": _block_survives,
    "modes are recognised": _modes_are_known,
    "hard switch": _hard_switch,
}
