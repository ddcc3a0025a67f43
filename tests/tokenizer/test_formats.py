"""What training templates write and mark, against a second implementation, the model's own, and spans in the text."""

import functools
import json
import random
import re
from itertools import groupby, product
from pathlib import Path

import pytest
from model_templates import ANSWERS, MINIMAL, TEMPLATES
from real import REAL, needs_real
from support import ROOT
from transformers.utils.chat_template_utils import render_jinja_template

from rsft_lib import demo
from rsft_lib.tokenizer.chat import ChatTemplate, encode, prompt_ids, trained_texts
from rsft_lib.tokenizer.fitting import training_template
from rsft_lib.tokenizer.formats import FORMATS, R1_CHAT_TEMPLATE, is_ours, parse
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.tokenizer.sample_chats import DATE
from rsft_lib.tokenizer.template_changes import changes
from rsft_lib.tokenizer.template_clock import clock_at

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
    """300 conversations, 191 of them with tool calls."""
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


def own_text(name: str, chat: list[dict], prompt: bool = False, **given) -> str:
    _, template, special_tokens = TEMPLATES[name]
    with clock_at(DATE):
        return ChatTemplate(template, special_tokens).render(chat, prompt=prompt, **given)


@functools.cache
def fitted(name: str) -> ChatTemplate:
    """The training template for one of the model templates."""
    format, template, special_tokens = TEMPLATES[name]
    found, _ = training_template(ChatTemplate(template, special_tokens))
    assert found.format.name == format and is_ours(found.source)
    return found.chat_template


def turns(*answers: str | dict) -> list[dict]:
    """A chat with these answers."""
    messages = [answer if isinstance(answer, dict) else {"content": answer} for answer in answers]
    asked = enumerate(messages)
    return [m for n, a in asked for m in ({"role": "user", "content": f"{n}?"}, {"role": "assistant"} | a)]


def tool_chat(arguments: dict | str = "{}") -> list[dict]:
    """A thought and a call, its result, and an answer, twice."""
    call = {"type": "function", "id": "a23456789", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a23456789", "content": '{"sum": "4"}'}
    return [{"role": "user", "content": "?"}, message, result, {"role": "assistant", "content": "[4]"}] * 2


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"n": 1}}} for name in "fg"]
NO_SYSTEM = ("Mistral v0.1", "Mixtral")
KNOWS_TOOLS = [name for name in TEMPLATES if name not in ("SmolLM2", *NO_SYSTEM, "Zephyr", "Tulu", "Granite")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_without_thoughts_and_tools_is_written_as_by_the_models_own_template(name):
    for chat in (turns("4"), turns("4", "5", "so  it is"), turns("數學 🙂\nb")):
        expected = own_text(name, chat).replace("<think>\n\n</think>\n\n", "")
        assert fitted(name).render(chat) == expected
    question = [SYSTEM, *turns("4")[:1]]
    if name in NO_SYSTEM:
        with pytest.raises(ValueError, match="the model's own chat template has no system message"):
            fitted(name).render(question)
    else:
        assert fitted(name).render(question) == own_text(name, question)


@pytest.mark.parametrize("name", KNOWS_TOOLS)
def test_tools_calls_and_results_are_written_as_by_the_models_own_template(name):
    question, call = turns("4")[:1], tool_chat({"n": [2, 2]})[:3]
    call = [call[0], call[1] | {"content": ""}, call[2]]
    for chat in (question, [SYSTEM, *question]):
        assert fitted(name).render(chat, TOOLS) == own_text(name, chat, tools=TOOLS)
    assert fitted(name).render(call) == own_text(name, call)
    as_string = tool_chat('{"n": [2, 2]}')
    assert fitted(name).render(as_string) == fitted(name).render(tool_chat({"n": [2, 2]}))
    assert '{"n":[2,2]}' in fitted(name).render(tool_chat('{"n":[2,2]}')), "a string is written as it is"


ENDS = {  # after the last answer -> why texts change
    "": "every answer and tool call ends with EOS",
    "<|im_end|>\n<|endoftext|>": "nothing follows the end of the last answer",
}


@pytest.mark.parametrize("end", ENDS)
def test_what_a_models_own_template_writes_after_the_last_answer_is_no_reason_to_refuse_it(end):
    """Qwen1.5's ends an answer only where another turn follows; Phi-3's and InternLM2's write a second end."""
    last = f"{{% if loop.last and m.role == 'assistant' %}}{end}{{% else %}}<|im_end|>\n{{% endif %}}"
    found, texts = training_template(ChatTemplate(MINIMAL.replace("<|im_end|>\n", last), {}))
    assert found.source == training_template(ChatTemplate(MINIMAL, {}))[0].source
    assert changes(found, texts)[0]["plain"] == ENDS[end]


def test_a_template_that_drops_the_system_message_is_fitted_without_one():
    drops = MINIMAL.replace("in messages", "in messages if m.role != 'system'")
    found, _ = training_template(ChatTemplate(drops, {}))
    assert found.settings["begin"].keys() == {"plain"}
    with pytest.raises(ValueError, match="the model's own chat template has no system message"):
        found.chat_template.render([SYSTEM, *turns("4")])


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in KNOWS_TOOLS])
def test_a_template_whose_model_has_no_tools_refuses_them(name):
    for chat, tools in ((turns("4"), TOOLS), (tool_chat(), None)):
        with pytest.raises(ValueError, match="the model's own chat template has no tool"):
            fitted(name).render(chat, tools)


def conversations(name: str) -> list[list[dict]]:
    """Two turns in every form, and chats with tools where the format has them."""
    forms = ["<think>\na\n</think>\n\nb", "<short>b", "b", " b\n\nc", {"content": "b", "reasoning_content": "a"}]
    chats = [turns(*pair) for pair in product(forms, forms)]
    chats += [[SYSTEM, *chat] for chat in chats[::7] if name not in NO_SYSTEM]
    return chats + [tool_chat(), [SYSTEM, *tool_chat()]] * (name in KNOWS_TOOLS)


def differing(template: ChatTemplate, format: str, chat: list[dict]) -> bool:
    """Whether the trained spans are not those between the assistant's headers and the ends of its answers."""
    text, spans = trained_texts(template, [chat])[0]
    found = [match.span(1) for match in re.finditer(ANSWERS[format], text, re.DOTALL)]
    return [(span.start, span.end) for span in spans] != found


@pytest.mark.parametrize("name", TEMPLATES)
def test_trained_spans_are_those_between_header_and_end_and_prompts_begin_the_text(name):
    for chat in conversations(name):
        assert not differing(fitted(name), TEMPLATES[name][0], chat)
        text, spans = trained_texts(fitted(name), [chat])[0]
        answers = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
        for turn, span in zip(answers, spans, strict=True):
            assert fitted(name).render(chat[:turn], prompt=True) == text[: span.start]
            assert (chat[turn].get("reasoning_content") or "").strip() in text[span.start : span.end]


@needs_real
@pytest.mark.parametrize("name", KNOWS_TOOLS)
def test_trained_spans_of_real_tool_chats_are_those_between_header_and_end(real_chats, name):
    assert len(real_chats) == 300
    found = [differing(fitted(name), TEMPLATES[name][0], row["messages"]) for row in real_chats]
    assert sum(found) == 0


FAMILIES = Path(REAL or ".").parent / "cases" / "families"  # real templates over small vocabularies


def token_masks(tokenizer, format: str, chat: list[dict]) -> tuple[list[int], list[int]]:
    """The loss mask, and 1 for each token between an assistant's header and the end of its answer."""
    text = ChatTemplate.of(tokenizer).render(chat)
    answers = [match.span(1) for match in re.finditer(ANSWERS[format], text, re.DOTALL)]
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [int(any(begin <= start and end <= stop for begin, stop in answers)) for start, end in offsets]
    return encode(tokenizer, chat).loss_mask, inside


@needs_real
@pytest.mark.parametrize("family", ["llama3.1", "mistral-nemo", "qwen3-coder", "qwq-32b", "r1-0528-qwen3", "smollm3"])
def test_tokens_of_real_models_are_trained_between_header_and_end(real_chats, family):
    tokenizer = load_tokenizer(FAMILIES / family)
    template, _ = training_template(ChatTemplate.of(tokenizer))
    tokenizer.chat_template = template.source
    chats = [turns("4", "<think>\na\n</think>\n\nb"), [SYSTEM, *turns("<short>4", " 5\n")]]
    chats += [row["messages"] for row in real_chats] if template.settings["calls"] else []
    masks = [token_masks(tokenizer, template.format.name, chat) for chat in chats]
    assert sum(found != expected for found, expected in masks) == 0 and len(masks) in (2, 302)


def test_the_date_and_what_models_write_before_a_chat_stay():
    assert "Today Date: 26 Jul 2024" in fitted("Llama-3.1").render(turns("4"))
    assert fitted("Qwen2.5").render(turns("4")).startswith("<|im_start|>system\nYou are Qwen.<|im_end|>\n")
    assert fitted("Granite").render(turns("4")).startswith("<|start_of_role|>system<|end_of_role|>You are Granite.")


def test_changes_name_their_reasons():
    found = {name: changes(*training_template(ChatTemplate(*TEMPLATES[name][1:])))[0] for name in TEMPLATES}
    assert found["Qwen3"]["plain"] == "no empty chain of thought is added"
    assert found["QwQ"].keys() == {"prompt", "prompt of a second turn", "thoughts in two turns",
                                   "thoughts in reasoning_content"}  # fmt: skip
    assert found["Llama-3.1"]["date"].startswith("fixed at 26 July 2024")
    assert found["Mistral Nemo"]["system"] == "the system message stands before the first question at every turn"
    assert found["SmolLM2"]["tools"].startswith("refused: ") and "plain" not in found["SmolLM2"]
    unexplained = [(name, chat) for name, why in found.items() for chat in why if "see the difference" in why[chat]]
    assert unexplained == []


@pytest.mark.parametrize(
    "settings", ['{"begin": 1}', "{}", "{'a': lipsum()}", '{"end": "x"} %}{{ lipsum() }}{%- set a = {}']
)
def test_a_template_that_only_begins_like_ours_is_not_ours(settings):
    body = fitted("Qwen3").source.partition("\n")[2]
    assert not is_ours(f"{{%- set settings = {settings} %}}\n{body} ") and is_ours(fitted("Qwen3").source)
    assert parse(f"{{%- set settings = {settings} %}}\n{body}{{{{ lipsum() }}}}") is None


@pytest.mark.parametrize("place", ["README.md", "notebooks/01_patch_tokenizer.ipynb"])
def test_every_format_is_a_row_of_the_tables_that_users_read(place):
    text = (ROOT / place).read_text(encoding="utf-8")
    assert [format.name for format in FORMATS if f"| {format.name} | {format.models} |" not in text] == []
    assert {format.name for format in FORMATS} == ANSWERS.keys() == {"R1"} | {row[0] for row in TEMPLATES.values()}
