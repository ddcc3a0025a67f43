"""The chats on which the contract checks a chat template."""

import json

from rsft_lib.tokenizer.dialect import THINKLESS, Dialect

USER = {"role": "user", "content": "How many are 2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def conversation(dialect: Dialect) -> list[dict]:
    """A system message and two turns: an answer with thoughts and one without."""
    answers = dialect.write("think", "\nTwo and two.\n", "\n\nFour."), dialect.write("short", "", "Four.")
    thought, at_once = ({"role": "assistant", "content": answer} for answer in answers)
    return [SYSTEM, USER, thought, USER, at_once]


def calling(arguments, opening: str = "") -> list[dict]:
    """A user message, a tool call, its result, and an answer whose first character could merge with the header."""
    call = {"type": "function", "id": "call00000", "function": {"name": "add", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "call00000", "content": '{"sum": 4}'}
    answer = {"role": "assistant", "content": f'{opening}"4" it is.'}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, answer]


CHAT, ARGUMENTS = conversation(THINKLESS), {"numbers": [2, 2]}
REASONED = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
LONG = [USER, REASONED, *calling(json.dumps(ARGUMENTS)) * 2, *CHAT[3:], *CHAT[1:3], USER, REASONED]  # every kind
TOOL: dict = {"type": "function", "function": {"name": "add", "description": "Add numbers.", "parameters": {}}}
