"""Checks that a chat template renders the same text in training and in serving.

    python -m rsft_lib.tokenizer.template_checks FOLDER DIALECT EMPTY_BLOCK   prints the checks as JSON, with limits

A template is a program from an untrusted source: one that this kit does not ship is rendered by this command, in a
separate process.
"""

import json
import re
import sys
from dataclasses import asdict
from functools import partial
from itertools import groupby, pairwise, product
from pathlib import Path

from jinja2 import TemplateError

from rsft_lib.common.check_table import Check, Checks, Skip
from rsft_lib.common.sandbox import SECONDS, end_after, limited, run_with_limits
from rsft_lib.common.visible import visible
from rsft_lib.tokenizer.chat import ChatTemplate, encode, end_of_content, misplaced, prompt_ids
from rsft_lib.tokenizer.check_chats import ARGUMENTS, LONG, SYSTEM, TOOL, USER, calling, conversation
from rsft_lib.tokenizer.dialect import THINKLESS, Dialect, dialect_of
from rsft_lib.tokenizer.dialect_checks import check_dialect, names_of
from rsft_lib.tokenizer.formats import is_ours
from rsft_lib.tokenizer.patch import load_tokenizer
from rsft_lib.tokenizer.template_clock import difference


def check_template(folder: Path, tokenizer, dialect: Dialect = THINKLESS) -> Checks:
    """Run `CHECKS`, and those of the dialect, on the tokenizer loaded from `folder`.

    Checks that a failed one makes redundant are not run.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and is_ours(template.removesuffix(dialect.hard_switch)):
        return _check(tokenizer, dialect)
    return _check_elsewhere(folder, dialect)


def _check(tokenizer, dialect: Dialect = THINKLESS) -> Checks:
    checks, chat = Checks(), conversation(dialect)
    if _refuses_system(tokenizer):
        del chat[0]
    if checks.run("template renders", _renders, tokenizer, chat):
        checks.run("same at any time", _same_at_any_time, tokenizer)
        same_text = [checks.run("prompt begins text", _prompt_begins_text, tokenizer, dialect, chat)]
        same_text += [checks.run("thought survives", _thought_survives, tokenizer, chat)]
        same_text += [checks.run("messages in order", _messages_in_order, tokenizer, chat)]
        checks.run("BOS not doubled", _bos_not_doubled, tokenizer, chat)
        if all(same_text):
            _check_mask(checks, tokenizer, dialect, chat)
            check_dialect(checks, tokenizer, dialect)
    done, names = {check.name for check in checks}, [*CHECKS, *names_of(dialect)]
    skipped = [Check(name, None, "not run, since a check above failed") for name in names if name not in done]
    return Checks([*checks, *skipped])


def _refuses_system(tokenizer) -> bool:
    """Whether the template refuses system messages, as Mistral v0.1's does; rows with one are then rejected."""
    try:
        _text(tokenizer, [SYSTEM, USER], prompt=True)
    except TemplateError:
        return True
    except Exception:  # a template can raise anything: `_renders` reports it
        return False
    return False


def _check_mask(checks: Checks, tokenizer, dialect: Dialect, chat: list[dict]) -> None:
    for name, check in MASK_CHECKS.items():
        checks.run(name, check, tokenizer, dialect, chat)
        if checks[-1].passed is False:
            return


def _check_elsewhere(folder: Path, dialect: Dialect) -> Checks:
    """Run the checks in a process with limits on CPU time, memory and wall time."""
    block = "masked" if dialect.masked else "trained"
    try:
        printed = run_with_limits("rsft_lib.tokenizer.template_checks", str(folder), dialect.name, block)
    except ValueError as error:
        return _not_rendered(str(error))
    return Checks(Check(**check) for check in json.loads(printed))


def _not_rendered(reason: str) -> Checks:
    skipped = [Check(name, None, "not run, since the template does not render") for name in CHECKS[1:]]
    return Checks([Check(CHECKS[0], False, visible(reason)), *skipped])


def _renders(tokenizer, chat: list[dict]) -> str:
    parts = [chat[:end] for end in range(1, len(chat) + 1) if chat[end - 1]["role"] != "system"]
    try:
        longest = max(len(_text(tokenizer, part, prompt)) for part in parts for prompt in (False, True))
    except (MemoryError, TimeoutError):
        raise
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return f"{len(parts)} prefixes of a conversation, at most {longest} characters"


def _same_at_any_time(tokenizer) -> str:
    """The text does not depend on the time or on randomness.

    Every prefix of a conversation is rendered: as training text if it ends with an answer, otherwise as a prompt.
    """
    parts = [[*system, *LONG[:end]] for system in ([], [SYSTEM]) for end in range(1, len(LONG) + 1)]
    cases = list(product(parts, (None, [TOOL])))
    for chat, tools in cases:
        prompt = chat[-1]["role"] != "assistant"
        if error := difference(partial(_text, tokenizer, chat, prompt, tools)):
            raise ValueError(error)
    return f"the texts of {len(cases)} conversations do not depend on the clock"


def _prompt_begins_text(tokenizer, dialect: Dialect, chat: list[dict]) -> str:
    """The tokens of a prompt are a prefix of the training text, in each mode and at each turn."""
    written = {mode: dialect.write(mode, "Two." * (mode == "think"), "Four.") for mode in dialect.forms}
    cases = [([USER], written[mode], mode) for mode in written] + [([USER], written["think"], None)]
    cases += [(chat[:-3], written["think"], "think"), (chat[:-1], written["short"], "short")]
    for asking, answer, mode in cases:
        prompt, asked = prompt_ids(tokenizer, asking, mode, dialect=dialect), dialect.ask(USER["content"], mode)
        ids = _ids(tokenizer, [*asking[:-1], USER | {"content": asked}, {"role": "assistant", "content": answer}])
        if ids[: len(prompt)] != prompt:
            text = tokenizer.decode(ids)
            adds = re.search(r"<think>\s*</think>", text) and not dialect.empty_block
            hint = ": the template writes empty thoughts, as the dialect qwen3 needs them (`dialect`)" if adds else ""
            raise ValueError(
                f"in mode {mode}, the prompt {tokenizer.decode(prompt)!r} is not a prefix of the training text "
                f"{text!r}{hint}"
            )
    return f"{len(cases)} prompts, the last with {len(prompt)} tokens"


def _thought_survives(tokenizer, chat: list[dict]) -> str:
    """The text contains every answer in full, also when more turns follow."""
    whole = _text(tokenizer, chat)
    for end in (len(chat) - 2, len(chat)):
        part, answer = _text(tokenizer, chat[:end]), chat[end - 1]["content"]
        if answer not in part or not whole.startswith(part):
            raise ValueError(
                f"{answer!r} of turn {end} is rendered as {part!r}, and as {whole!r} when more turns follow"
            )
    return "answers are complete, the last one and earlier ones"


def _messages_in_order(tokenizer, chat: list[dict]) -> str:
    """The text contains user and system messages in order; `_tool_calls` checks tool messages."""
    chats = [chat, chat[-4:]]
    for chat in chats:
        _require_messages(_text(tokenizer, chat), chat)
    return f"every message of {len(chats)} conversations is in its place"


def _require_messages(text: str, chat: list[dict]) -> None:
    position = 0
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":  # other checks cover answers
            end = end_of_content(text, message, position)
            if end is None:
                raise ValueError(misplaced(turn, message))
            position = end


def _bos_not_doubled(tokenizer, chat: list[dict]) -> str:
    """BOS is not written twice; a model whose BOS begins every message, or whose template writes none, is sound."""
    served = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ids, bos = _ids(tokenizer, chat), tokenizer.bos_token_id
    if served != ids:
        raise ValueError(f"apply_chat_template returns {served[:4]} ..., training text begins with {ids[:4]}")
    if bos is None:
        return "the tokenizer has no BOS"
    if (bos, bos) in pairwise(ids):
        raise ValueError(f"{tokenizer.bos_token!r} is written twice in succession; the text begins with {ids[:4]}")
    if bos not in ids:
        return f"the template writes no {tokenizer.bos_token}, in training and serving alike"
    return f"{tokenizer.bos_token} ({bos}) occurs {ids.count(bos)} times, never twice in succession"


def _end_is_trained(tokenizer, _: Dialect, chat: list[dict]) -> str:
    eos = tokenizer.eos_token_id
    for text, ids in _trained_runs(tokenizer, chat):
        if ids[-1] != eos:
            raise ValueError(f"trained {text!r} does not end with {tokenizer.eos_token!r} ({eos})")
    return f"{tokenizer.eos_token} ({eos}) ends every trained answer"


def _header_is_not_trained(tokenizer, _: Dialect, chat: list[dict]) -> str:
    trained = [text.removesuffix(tokenizer.eos_token) for text, _ in _trained_runs(tokenizer, chat)]
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    if trained != answers:
        raise ValueError(f"the trained texts are {trained}, expected {answers}")
    return "exactly the answers and their EOS are trained"


def _tool_calls(tokenizer, dialect: Dialect, _: list[dict]) -> str:
    if refusal := _refusal(tokenizer, [TOOL]):
        raise Skip(refusal)
    # An answer without thoughts; Qwen3's templates add the empty think block to any other.
    opening = dialect.forms[dialect.empty_block].opening if dialect.empty_block else ""
    chat, objects = (calling(arguments, opening) * 2 for arguments in (json.dumps(ARGUMENTS), ARGUMENTS))
    _renders(tokenizer, chat)
    _require_messages(_text(tokenizer, chat), chat)
    runs = [text for text, _ in _trained_runs(tokenizer, chat)]
    call, answer = runs[0], chat[3]["content"] + tokenizer.eos_token
    if not (all(part in call for part in ("add", "numbers", "[2, 2]")) and call.endswith(tokenizer.eos_token)):
        raise ValueError(f"a call is trained as {call!r}, expected its name, its arguments and EOS")
    if [run.lstrip() for run in runs[1::2]] != [answer] * 2 or len(runs) != 4:
        raise ValueError(f"the trained texts are {runs}, expected a call and an answer, twice")
    for end in (2, 4, 6, 8):
        prompt, text = prompt_ids(tokenizer, chat[: end - 1]), _ids(tokenizer, chat)
        if text[: len(prompt)] != prompt:
            raise ValueError(
                f"the prompt of turn {end}, {tokenizer.decode(prompt)!r}, is not a prefix of training text"
            )
    if _text(tokenizer, objects) != _text(tokenizer, chat):
        raise ValueError("arguments passed as an object, as servers do, are rendered differently from a string")
    if TOOL["function"]["description"] not in _text(tokenizer, [USER], tools=[TOOL]):
        raise ValueError("the template does not render the tools of a conversation, so the model does not see them")
    return "tools are rendered; calls are trained including EOS, results are not"


def _refusal(tokenizer, tools: list[dict] | None = None) -> str:
    """Why the template writes no tool calls, so that no conversation with them is trained; '' if it does."""
    if "tool_calls" not in tokenizer.chat_template:
        return "the template does not support tools"
    try:
        _text(tokenizer, calling(ARGUMENTS), tools=tools)
    except TemplateError as refusal:
        return f"the template refuses tool calls: {refusal}"
    return ""


def _mask_as_marked(tokenizer, _: Dialect, chat: list[dict]) -> str:
    """The loss mask of `encode` is the one that transformers and other trainers compute from `{% generation %}`.

    White space that a template marks after EOS, or that the prompt ends with, is not trained.
    """
    if not ChatTemplate.of(tokenizer).marks_answers:
        raise Skip("the template has no {% generation %}: the mask is computed by rendering turn by turn")
    for marked in [chat, *([] if _refusal(tokenizer) else [calling(ARGUMENTS)])]:
        encoded, (ids, mask) = encode(tokenizer, marked), _marked(tokenizer, marked)
        differ = {
            tokenizer.decode([number]).strip() if in_block else number
            for number, trained, in_block in zip(ids, encoded.loss_mask, mask, strict=True)
            if bool(trained) != bool(in_block)
        }
        if encoded.ids != ids or differ - {""}:
            raise ValueError(f"{sum(mask)} tokens are marked, {sum(m > 0 for m in encoded.loss_mask)} are trained")
    return f"the {sum(m > 0 for m in encoded.loss_mask)} trained tokens are those that the template marks"


def _text(tokenizer, chat: list[dict], prompt: bool = False, tools: list[dict] | None = None) -> str:
    chat = ChatTemplate.of(tokenizer).prepared(chat)
    return tokenizer.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=prompt)


def _ids(tokenizer, chat: list[dict]) -> list[int]:
    return tokenizer(_text(tokenizer, chat), add_special_tokens=False)["input_ids"]


def _marked(tokenizer, chat: list[dict]) -> tuple[list[int], list[int]]:
    out = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], list(out["assistant_masks"])


def _trained_runs(tokenizer, chat: list[dict]) -> list[tuple[str, list[int]]]:
    """Text and ids of each run of trained tokens."""
    encoded, text = encode(tokenizer, chat), _text(tokenizer, chat)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    tokens = groupby(zip(encoded.ids, encoded.loss_mask, offsets, strict=True), key=lambda token: token[1] > 0)
    runs = [list(run) for trained, run in tokens if trained]
    return [(text[run[0][2][0] : run[-1][2][1]], [number for number, _, _ in run]) for run in runs]


MASK_CHECKS = {
    "end is trained": _end_is_trained,
    "header is not trained": _header_is_not_trained,
    "tool calls": _tool_calls,
    "mask as marked": _mask_as_marked,
}
CHECKS = [
    "template renders",
    "same at any time",
    "prompt begins text",
    "thought survives",
    "messages in order",
    "BOS not doubled",
    *MASK_CHECKS,
]


def main() -> None:
    folder, name, block = sys.argv[1:]
    tokenizer, dialect = load_tokenizer(folder), dialect_of({"dialect": name, "empty_block": block})
    end_after(2 * SECONDS)
    try:
        with limited("rendering the template"):
            checks = _check(tokenizer, dialect)
    except ValueError as error:
        sys.exit(str(error))
    print(json.dumps([asdict(check) for check in checks]))


if __name__ == "__main__":
    main()
