"""Convert records of several layouts to conversations: messages, tools, and the names of unused fields.

{"messages": [...]}   {"conversations": [{"from": "human", "value": ...}, ...]}     OpenAI, ShareGPT
{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}     Alpaca
{"prompt": ..., "response": ...}   {"problem": ..., "solution": ...}

A message, or a record of the last two layouts, may have `mode_given` and `thoughts_cut` (`tokenizer.chat`).
"""

from collections.abc import Iterator
from typing import NamedTuple

from rsft_lib.tokenizer.chat import REASONING

PAIRS = (("instruction", "output"), ("prompt", "response"), ("problem", "solution"))
CHATS = ("messages", "conversations")
LAYOUTS = (*((name,) for name in CHATS), *PAIRS)
RULES = 3  # version of the conversion; increase it when records convert differently, so that outputs are rebuilt
SYSTEM = ("system", "system_prompt")  # becomes the first message

# ShareGPT's names for OpenAI's message fields and roles.
SHAREGPT_KEYS = {"from": "role", "value": "content"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}
ROLES = ("system", "user", "assistant", "tool")
FLAGS = ("mode_given", "thoughts_cut")  # of the last answer, also as fields of the record
MESSAGE_FIELDS = {"role", "content", "name", "tool_calls", "tool_call_id", "train", "weight", *FLAGS, *REASONING}


class Conversation(NamedTuple):
    """The converted record; `unused` names its non-empty fields that are not part of the conversation."""

    messages: list[dict]
    tools: list[dict] | None
    unused: tuple[str, ...]


def conversation(record: dict, columns: dict[str, str] | None = None) -> Conversation:
    """Convert a record of any of the layouts above.

    Args:
        columns: field -> its name in this dataset, e.g. {'prompt': 'question', 'response': 'answer'}.

    Raises:
        ValueError: fields are missing, or one that is used is empty, of the wrong type, or damaged.
    """
    columns = columns or {}
    known = _renamed(record, columns)
    layout = _layout(known, columns)
    used = {*layout}
    unused: list[str] = []
    if layout in PAIRS:
        prompt, response = layout
        messages = _turns(known, prompt, response, used)
        flags = {name: True for name in FLAGS if known.get(name) is True}
        used |= flags.keys()
        messages[-1] |= flags
    else:
        (name,) = layout
        messages = [_message(message, f"{name}[{i}]", unused) for i, message in enumerate(_list(known[name], name))]
    messages = _with_system(known, messages, used)
    tools = _tools(known, used)
    _refuse_half_characters(messages, "messages")
    _refuse_half_characters(tools, "tools")
    used = {columns.get(name, name) for name in used}
    unused += [name for name, value in record.items() if name not in used and not is_empty(value)]
    return Conversation(messages, tools, tuple(dict.fromkeys(map(_shown, unused))))


def is_empty(value) -> bool:
    """Whether a field is null, blank, or an empty list or object."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def strings(value) -> Iterator[str]:
    """Every string in a message or a list of tools, including the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def _renamed(record: dict, columns: dict[str, str]) -> dict:
    missing = [theirs for theirs in columns.values() if theirs not in record]
    if missing:
        raise ValueError(f"found the fields {sorted(record)}, but `columns` names {', '.join(missing)}")
    rest = {name: value for name, value in record.items() if name not in columns.values()}
    return rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _layout(record: dict, columns: dict[str, str]) -> tuple[str, ...]:
    """The first layout whose fields are all non-empty, or else all present; layouts in `columns` are tried first."""
    layouts = sorted(LAYOUTS, key=lambda layout: not any(name in columns for name in layout))
    for is_given in (lambda value: not is_empty(value), lambda value: value is not None):
        for layout in layouts:
            if all(is_given(record.get(name)) for name in layout):
                return layout
    known = ", ".join("/".join(layout) for layout in LAYOUTS)
    raise ValueError(f"found the fields {sorted(record)}, expected one of {known}; or name them in `columns`")


def _turns(record: dict, prompt: str, response: str, used: set[str]) -> list[dict]:
    """A question and its answer as messages, preceded by the turns of `history`."""
    question = _text(record[prompt], prompt, empty=True)
    if prompt == "instruction" and not is_empty(record.get("input")):
        used.add("input")
        question = "\n".join(part for part in (question, _text(record["input"], "input")) if part.strip())
    turns = []
    if not is_empty(record.get("history")):
        used.add("history")
        turns = [_turn(turn, f"history[{i}]") for i, turn in enumerate(_list(record["history"], "history"))]
    turns.append((_text(question, prompt), _text(record[response], response)))
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _turn(turn, place: str) -> tuple[str, str]:
    if not isinstance(turn, list) or len(turn) != 2:
        raise ValueError(f"{place} is {turn!r:.60}, expected [question, answer]")
    return _text(turn[0], f"{place}[0]"), _text(turn[1], f"{place}[1]")


def _with_system(record: dict, messages: list[dict], used: set[str]) -> list[dict]:
    """The messages, preceded by the record's system prompt if it has one."""
    name = next((name for name in SYSTEM if not is_empty(record.get(name))), None)
    if name is None:
        return messages
    used.add(name)
    system = {"role": "system", "content": _text(record[name], name)}
    return messages if messages[:1] == [system] else [system, *messages]


def _tools(record: dict, used: set[str]) -> list[dict] | None:
    if is_empty(record.get("tools")):
        return None
    used.add("tools")
    for i, tool in enumerate(_list(record["tools"], "tools")):
        if not isinstance(tool, dict):
            raise ValueError(f"tools[{i}] is {tool!r:.60}, expected an object")
    return record["tools"]


def _message(message, place: str, unused: list[str]) -> dict:
    """A message without nulls, its fields checked; the names of unknown fields are added to `unused`."""
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {message!r:.60}, expected an object with role and content")
    message = _with_openai_keys(message, place)
    unused += [f"messages[].{key}" for key in message if key not in MESSAGE_FIELDS and not is_empty(message[key])]
    parts = message["content"] if isinstance(message.get("content"), list) else ()
    extra = {key for part in parts if isinstance(part, dict) for key in part if not is_empty(part[key])}
    unused += [f"messages[].content[].{key}" for key in sorted(extra - {"type", "text"})]
    role = message.get("role")
    role = message["role"] = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"{place}: role is {role!r:.60}, expected one of {', '.join(ROLES)}")
    _check_flags(message, place)
    for name in REASONING:
        if name in message:
            message[name] = _text(message[name], f"{place}.{name}", empty=True)
            if is_empty(message[name]):
                del message[name]
    reasoning = next((name for name in REASONING if name in message), None)
    if role == "assistant" and reasoning:  # the name that templates read; older transformers translate none
        message.setdefault("reasoning_content", message.pop(reasoning))
    if message.get("tool_calls"):
        _check_calls(message["tool_calls"], place)
    if "content" in message or not message.get("tool_calls"):
        needs_content = role in ("user", "assistant") and not message.get("tool_calls")
        message["content"] = _text(message.get("content"), f"{place}.content", empty=not needs_content)
    return message


def _with_openai_keys(message: dict, place: str) -> dict:
    """A message without nulls and with ShareGPT's keys renamed; of two spellings of a key, an empty one is dropped."""
    renamed: dict = {}
    for key, value in message.items():
        name = SHAREGPT_KEYS.get(key, key)
        if value is None or (name in renamed and is_empty(value)):
            continue
        if name in renamed and not is_empty(renamed[name]) and renamed[name] != value:
            theirs = next(key for key, ours in SHAREGPT_KEYS.items() if ours == name)
            raise ValueError(
                f"{place} has {name} and {theirs}, and they differ: {renamed[name]!r:.40} and {value!r:.40}"
            )
        renamed[name] = value
    return renamed


def _check_flags(message: dict, place: str) -> None:
    for name in ("train", *FLAGS):
        if not isinstance(message.get(name, True), bool):
            raise ValueError(f"{place}: {name} is {message[name]!r:.60}, expected true or false")


def _check_calls(calls, place: str) -> None:
    for call in _list(calls, f"{place}.tool_calls"):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
            raise ValueError(f"{place}: a tool call needs function.name and function.arguments, found {call!r:.80}")
        if not isinstance(function["arguments"], dict | str):
            raise ValueError(
                f"{place}: function.arguments is {function['arguments']!r:.60}, expected an object or a JSON string"
            )


def _shown(name: str) -> str:
    """A field name shortened and made encodable, for the manifest."""
    return name[:60].encode("utf-8", "backslashreplace").decode()


def _refuse_error(value, name: str) -> None:
    """Values that JSON cannot represent are read as exceptions (`records`)."""
    if isinstance(value, Exception):
        raise ValueError(f"{name}: {value}")


def _list(value, name: str) -> list:
    _refuse_error(value, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list")
    return value


def _text(value, name: str, empty: bool = False) -> str:
    """A string, or the concatenated text of a list of content parts."""
    if isinstance(value, list) and all(_is_text_part(part) for part in value):
        value = "".join(part["text"] for part in value)
    _refuse_error(value, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.60}, expected text")
    if not (empty or value.strip()):
        raise ValueError(f"{name} is {value!r:.60}, expected text that is not empty")
    return value


def _is_text_part(part) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _refuse_half_characters(value, what: str) -> None:
    """JSON can escape half of a surrogate pair, which is not a character and cannot be encoded."""
    for text in strings(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what}: {text[error.start : error.start + 20]!a} at character {error.start} of a text is half of a "
                "surrogate pair; the text is damaged"
            ) from None
