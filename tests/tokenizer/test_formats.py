"""The text and marks of patched templates, compared with a second implementation in Python."""

import json
import random
from itertools import groupby
from pathlib import Path

import pytest
from real import REAL, needs_real
from transformers.utils.chat_template_utils import render_jinja_template

from rsft_lib import demo
from rsft_lib.tokenizer.chat import ChatTemplate, encode, prompt_ids
from rsft_lib.tokenizer.fitting import training_template
from rsft_lib.tokenizer.formats import R1_CHAT_TEMPLATE
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

R1 = ChatTemplate(R1_CHAT_TEMPLATE, {"bos_token": demo.BOS})
NEW = training_template(R1)[0].source
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
    rng, template = random.Random(0), training_template(R1, newline)[0].source
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
