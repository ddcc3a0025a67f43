"""The text and marks of patched templates, compared with a second implementation in Python."""

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from real import REAL, needs_real
from transformers.utils.chat_template_utils import render_jinja_template

from rsft_lib import demo
from rsft_lib.tokenizer.chat import encode, prompt_ids
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.tokenizer.templates import QWEN, R1_CHAT_TEMPLATE, patch_template, recognise

NEW = patch_template(R1_CHAT_TEMPLATE)[0]
HARD = [
    "x", " two  spaces ", "\n\nlines\n", "数学 🙂 👩‍👩‍👧", '"quoted"', "<think>\n\n</think>\n\n4", "<b>&amp;",
    "{{ bos_token }}{% raw %}",
    "<think>\na </think> in a thought\n</think>\n\n" + "4", "<short>4", "</think>", "a\\nb", "e\u0301", "'", "[", "…",
]  # fmt: skip


def render(template: str, chat: list[dict], prompt: bool = False, **given) -> tuple[str, list[str]]:
    """The text that transformers renders, and the parts that the template marks as assistant output."""
    (text,), (spans,) = render_jinja_template(
        [chat], chat_template=template, add_generation_prompt=prompt, return_assistant_tokens_mask=True,
        bos_token=demo.BOS, **given,
    )  # fmt: skip
    return text, [text[start:end] for start, end in spans]


def by_hand(chat: list[dict], tools: list[dict], header: str) -> list[tuple[str, bool]]:
    """An R1 conversation as (text, is assistant output)."""
    system = "".join(m["content"] for m in chat if m["role"] == "system")
    parts = [(demo.BOS + system, False)]
    if tools:
        lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
        parts.append(("\n\n" * bool(system) + "\n".join(["## Tools\n", *lines]), False))
    after_tool = False
    for message in chat:
        closing = "<｜tool▁outputs▁end｜>" if after_tool and message["role"] != "tool" else ""
        if message["role"] == "user":
            parts.append((f"{closing}<｜User｜>{message['content']}", False))
        elif message["role"] == "tool":
            opening = "\n" if after_tool else "<｜tool▁outputs▁begin｜>"
            parts.append((f"{opening}<｜tool▁output▁begin｜>{message['content']}<｜tool▁output▁end｜>", False))
        elif message["role"] == "assistant":
            parts += [(closing + header, False), (answer_by_hand(message) + demo.EOS, True)]
        after_tool = message["role"] == "tool"
    return [*parts, ("<｜tool▁outputs▁end｜>" if after_tool else "", False)]


def answer_by_hand(message: dict) -> str:
    content, thought, calls = message.get("content") or "", message.get("reasoning_content"), []
    for call in message.get("tool_calls") or []:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append(
            f"<｜tool▁call▁begin｜>{call['type']}<｜tool▁sep｜>{call['function']['name']}\n```json\n{text}\n```<｜tool▁call▁end｜>"
        )
    written = f"<｜tool▁calls▁begin｜>{chr(10).join(calls)}<｜tool▁calls▁end｜>" if calls else ""
    thought = f"<think>\n{thought}\n</think>\n\n" if thought and "</think>" not in content else ""
    return thought + content + written


def random_chat(rng: random.Random) -> list[dict]:
    chat = [{"role": "system", "content": rng.choice(HARD)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        chat.append({"role": "user", "content": rng.choice(HARD)})
        while rng.random() < 0.4:
            chat.append(
                {"role": "assistant", "content": rng.choice([None, "", rng.choice(HARD)]), "tool_calls": calls(rng)}
            )
            chat += [{"role": "tool", "content": rng.choice(HARD)} for _ in chat[-1]["tool_calls"]]
        chat.append({"role": "assistant", "content": rng.choice(HARD)})
        if rng.random() < 0.2:
            chat[-1]["reasoning_content"] = "in a field of its own"
    return chat


def calls(rng: random.Random) -> list[dict]:
    arguments = ['{"a": 1}', {"a": "数", "b": [1, None]}, "no JSON"]
    return [
        {"type": "function", "function": {"name": "f", "arguments": rng.choice(arguments)}}
        for _ in range(rng.randint(1, 3))
    ]


@pytest.mark.parametrize("newline", [False, True])
def test_r1s_template_writes_and_marks_what_a_second_implementation_does(newline):
    rng, template = random.Random(0), patch_template(R1_CHAT_TEMPLATE, newline)[0]
    header = "<｜Assistant｜>" + "\n" * newline
    for _ in range(5000):
        chat, tools = (
            random_chat(rng),
            rng.choice([[], [{"name": "f"}, {"type": "function", "function": {"name": "g"}}]]),
        )
        parts = by_hand(chat, tools, header)
        text, written = render(template, chat, tools=tools)
        assert text == "".join(part for part, _ in parts)
        assert written == [part for part, answer in parts if answer]


def test_what_is_served_at_every_turn_is_how_the_whole_conversation_begins():
    rng = random.Random(1)
    for _ in range(300):
        chat = random_chat(rng)
        whole, _ = render(NEW, chat)
        for turn, message in enumerate(chat):
            if message["role"] == "assistant":
                prompt, _ = render(NEW, chat[:turn], prompt=True)
                assert whole.startswith(prompt) and prompt.endswith("<｜Assistant｜>")
                assert whole[len(prompt) :].startswith(answer_by_hand(message) + demo.EOS)


def test_a_content_that_is_no_text_is_an_error():
    with pytest.raises(TypeError):
        render(
            NEW, [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]
        )


@pytest.fixture(scope="module")
def real_chats() -> list[dict]:
    lines = (Path(REAL) / "data" / "chat_glaive_toolcall.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@needs_real
def test_real_chats_without_tool_calls_are_written_as_the_stock_template_does(real_chats):
    plain = [row["messages"] for row in real_chats if not any("tool_calls" in m for m in row["messages"])]
    assert len(plain) == 147
    for chat in plain:
        stock, _ = render_jinja_template([chat], chat_template=R1_CHAT_TEMPLATE, bos_token=demo.BOS)
        assert render(NEW, chat)[0] == stock[0]


@needs_real
def test_real_tool_chats_are_trained_by_their_answers_calls_and_ends_alone(real_chats, tmp_path):
    patch_tokenizer(Path(REAL) / "tokenizers" / "r1-distill-qwen", tmp_path / "r1", {"<|quad_start|>": "<short>"})
    tokenizer = load_tokenizer(tmp_path / "r1")
    for row in real_chats:
        chat = row["messages"]
        encoded, parts = encode(tokenizer, chat), by_hand(chat, [], "<｜Assistant｜>")
        pairs = groupby(zip(encoded.ids, encoded.loss_mask, strict=True), key=lambda pair: pair[1] > 0)
        runs = [(tokenizer.decode([number for number, _ in run]), trained) for trained, run in pairs]
        merged = [("".join(text for text, _ in run), key) for key, run in groupby(parts, key=lambda part: part[1])]
        assert runs == [part for part in merged if part[0]]
        marked = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert list(marked["assistant_masks"]) == encoded.loss_mask and marked["input_ids"] == encoded.ids
        for turn in (turn for turn, message in enumerate(chat) if message["role"] == "assistant"):
            prompt = prompt_ids(tokenizer, chat[:turn])
            assert encoded.ids[: len(prompt)] == prompt


# Templates with what the edits look for in Qwen's: 2.5 has one branch for users and answers, 3 strips and makes up
# thoughts. Both tell how to call tools in the same words.
HEAD = """{%- if tools %}
    {{- '<|im_start|>system\\n' + tools[0] | tojson + '{\\"arguments\\": <args-json-object>}<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
"""
TAIL = """    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
"""
LIKE_QWEN25 = (
    HEAD
    + """    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant' + message.content }}
        {%- for tool_call in message.tool_calls %}{{- tool_call.function.arguments | tojson }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
"""
    + TAIL
    + "{%- endif %}\n"
)
LIKE_QWEN3 = (
    HEAD
    + """    {%- if message.role == "user" %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1] %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
"""
    + TAIL
    + """    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
)


@pytest.mark.parametrize("stock", [LIKE_QWEN25, LIKE_QWEN3])
def test_qwens_templates_keep_thoughts_make_up_none_and_mark_answers_with_their_end(stock):
    assert recognise(stock) is QWEN
    template, edits = patch_template(stock)
    assert [edit.name for edit in edits][-2:] == ["assistant turn", "generation prompt"] or stock is LIKE_QWEN25
    assert patch_template(template) == (template, [])
    thought, call = "<think>\nhm\n</think>\n\n4", {"function": {"name": "f", "arguments": '{"a": 1}'}}
    answers = [
        {"content": thought}, {"content": "<short>4"}, {"content": None, "tool_calls": [call]},
        {"content": "so", "tool_calls": [call, {"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"content": "4", "reasoning_content": "hm"},
    ]  # fmt: skip
    chat = [m for answer in answers for m in ({"role": "user", "content": "?"}, {"role": "assistant", **answer})]
    text, written = render(template, chat)
    called = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    expected = [thought, "<short>4", called, f"so\n{called}\n{called}", thought]
    assert written == [f"{answer}<|im_end|>" for answer in expected]
    turns = (f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n" for answer in expected)
    assert text == "".join(turns)
    for turn in range(1, len(chat), 2):
        assert text.startswith(render(template, chat[:turn], prompt=True, enable_thinking=False)[0])


def test_a_template_that_lacks_a_part_or_cannot_have_a_newline_is_refused():
    with pytest.raises(
        ValueError, match="trailing_newline is for R1's template; this template is of family Qwen2.5 and Qwen3"
    ):
        patch_template(LIKE_QWEN3, trailing_newline=True)
    with pytest.raises(ValueError, match="'generation prompt' does not find '{%- if add_generation_prompt %}'"):
        patch_template(LIKE_QWEN3.replace("{%- if add_generation_prompt %}", "{% if add_generation_prompt %}"))
