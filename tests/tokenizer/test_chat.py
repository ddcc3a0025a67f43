"""Loss masks of conversations."""

import random
from pathlib import Path

import numpy as np
import pytest
from real import LONG, REAL, needs_real
from support import to_messages

from rsft_lib import demo
from rsft_lib.data.encoder import FastEncoder, ReferenceEncoder, best_encoder, gigatoken
from rsft_lib.tokenizer.chat import (
    LOSS_WEIGHTS,
    ChatTemplate,
    Span,
    encode,
    mask_of,
    prompt_ids,
    trained_texts,
    weight_code,
)
from rsft_lib.tokenizer.dialect import MODES
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

SHORT = {"<|quad_start|>": "<short>"}
THOUGHT = "<think>\ntwo plus two\n</think>\n\nAnswer: four"

# As Qwen's, with a line break after EOS, and as one that marks what the assistant writes.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{% endif %}\n",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return demo.make_model(tmp_path_factory.mktemp("data") / "model", seed=0)


@pytest.fixture(scope="module")
def patched(model):
    patch_tokenizer(model, model.with_name("patched"), SHORT)
    return model.with_name("patched")


@pytest.fixture
def tokenizer(patched):
    return load_tokenizer(patched)


def conversation(answer: str, **extra) -> list[dict]:
    return [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer, **extra}]


def trained(tokenizer, messages, **options) -> str:
    encoded = encode(tokenizer, messages, **options)
    return tokenizer.decode([i for i, m in zip(encoded.ids, encoded.loss_mask, strict=True) if m])


def test_the_mask_trains_the_answer_and_its_end_and_nothing_else(tokenizer):
    """
    text   <bos> <｜User｜> How many ? <｜Assistant｜> <short> Answer : four <eos>
    mask     0      0      0   0  0       0           1      1    1   1     1
    """
    encoded = encode(tokenizer, conversation("<short>Answer: four"))
    tokens = [tokenizer.decode([i]) for i in encoded.ids]
    expected = [demo.BOS, "<｜User｜>", "How many?", "<｜Assistant｜>"], ["<short>", "Answer", ":", " four", demo.EOS]
    edge = encoded.loss_mask.index(1)
    assert ["".join(tokens[:edge])] == ["".join(expected[0])]
    assert tokens[edge:] == expected[1]
    assert encoded.loss_mask == [0] * edge + [1] * 5


def test_every_assistant_turn_is_trained_and_no_header_or_the_last_alone(tokenizer):
    messages = conversation("<short>one") + conversation(THOUGHT)
    assert trained(tokenizer, messages) == f"<short>one{demo.EOS}{THOUGHT}{demo.EOS}"
    assert trained(tokenizer, messages, turns="last") == f"{THOUGHT}{demo.EOS}"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_other_templates_train_up_to_eos_whether_they_mark_their_answers_or_not(template, tokenizer):
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "Be short."}, *conversation("one"), *conversation(THOUGHT)]
    assert trained(tokenizer, messages) == f"one{demo.EOS}{THOUGHT}{demo.EOS}"


def test_a_message_may_be_context_only_or_weigh_less(tokenizer):
    messages = conversation("<short>one", train=False) + conversation("<short>two", weight=0.25)
    encoded = encode(tokenizer, messages)
    assert trained(tokenizer, messages) == f"<short>two{demo.EOS}"
    assert {LOSS_WEIGHTS[code] for code in encoded.loss_mask} == {0, np.float32(0.25)}
    with pytest.raises(ValueError, match="no assistant message to train on"):
        encode(tokenizer, conversation("<short>one", train=False))


@pytest.mark.parametrize(("mode", "answer"), [("think", THOUGHT), ("short", "<short>four")])
def test_of_an_answer_in_a_given_mode_the_mask_begins_where_the_prompt_that_asks_for_it_ends(tokenizer, mode, answer):
    chosen, given = (encode(tokenizer, conversation(answer, mode_given=value)) for value in (False, True))
    prompt = prompt_ids(tokenizer, conversation("")[:1], mode)
    assert given.ids == chosen.ids and chosen.loss_mask == encode(tokenizer, conversation(answer)).loss_mask
    assert given.loss_mask == [0] * len(prompt) + [1] * (len(given.ids) - len(prompt))


def test_weights_are_hundredths_and_others_are_refused():
    for weight in (0, 0.01, 0.5, 1, 1.0, 1.3, 2.54):
        assert LOSS_WEIGHTS[weight_code({"weight": weight})] == np.float32(weight)
    for weight in (-0.1, 2.55, "1", True, float("nan")):
        with pytest.raises(ValueError, match="it must be a number from 0 to 2.54"):
            weight_code({"weight": weight})


@pytest.mark.parametrize("mode", [None, *MODES])
def test_a_prompt_is_a_prefix_of_training_text(tokenizer, mode):
    answer = {"think": THOUGHT, "short": "<short>four", None: THOUGHT}[mode]
    prompt = prompt_ids(tokenizer, conversation("")[:1], mode)
    assert encode(tokenizer, conversation(answer)).ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<｜Assistant｜>" + MODES.get(mode, ""))


def test_a_template_that_strips_the_chain_of_thought_is_refused(model):
    with pytest.raises(ValueError, match="patch the template"):
        encode(load_tokenizer(model), conversation(THOUGHT))
    tokenizer = load_tokenizer(model)  # the generation prompt is correct, but the chain of thought is stripped
    tokenizer.chat_template = demo.R1_CHAT_TEMPLATE.replace("<think>\\n", "")
    with pytest.raises(ValueError, match="drops part of the answer"):
        encode(tokenizer, conversation(THOUGHT))


def test_reasoning_in_a_field_of_its_own_is_trained_or_refused_where_the_template_does_not_show_it(tokenizer):
    messages = conversation("Answer: four", reasoning_content="two plus two")
    assert trained(tokenizer, messages) == THOUGHT + demo.EOS
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match="message 1: the chat template drops part of the answer"):
        encode(tokenizer, messages)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "does not end the answer with"),
        ("{{ 1 / 0 }}", "the chat template fails on this conversation"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages | length }} {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "differently"),
        ("{% generation %}x{{ eos_token }}{% endgeneration %} {% generation %}y{% endgeneration %}", "marks 2 answers"),
    ],
)
def test_a_template_with_ambiguous_answers_is_refused(template, message, tokenizer):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        encode(tokenizer, conversation("<short>four"))


def test_a_token_across_the_edge_of_an_answer_is_refused_by_both_encoders(tokenizer):
    with pytest.raises(ValueError, match="crosses the boundary"):
        mask_of([(0, 3), (3, 6)], [Span(4, 6)], "abcdef")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    tokenizer.chat_template += "{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "Emil has sev"}, {"role": "assistant", "content": "en eggs"}]
    text, spans = trained_texts(ChatTemplate.of(tokenizer), [messages])[0]
    for encoder in encoders(tokenizer):
        (found,) = encoder.encode([text], [spans])
        assert isinstance(found, ValueError) and "crosses the boundary" in str(found)


def encoders(tokenizer) -> list:
    kinds = [ReferenceEncoder, *([FastEncoder] if gigatoken else [])]
    return [kind(tokenizer.backend_tokenizer.to_str()) for kind in kinds]


@pytest.mark.skipif(not gigatoken, reason="gigatoken is not installed (pip install 'gigatoken<0.11')")
def test_the_fast_encoder_is_taken_only_when_it_agrees(tokenizer, monkeypatch):
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    chosen, facts = best_encoder(tokenizer_json, ["two eggs"])
    assert facts["hard_texts_compared"] > 250 and facts["texts_compared"] == 1
    assert chosen.name == facts["encoder"] == FastEncoder.name

    def backwards(self, *arguments, encode=FastEncoder.encode):
        return [sample._replace(ids=sample.ids[::-1]) for sample in encode(self, *arguments)]

    monkeypatch.setattr(FastEncoder, "encode", backwards)
    chosen, facts = best_encoder(tokenizer_json, ["two eggs"])
    assert isinstance(chosen, ReferenceEncoder) and "encode" in facts["why_slow"]
    monkeypatch.setattr("rsft_lib.data.encoder.gigatoken", None)
    chosen, facts = best_encoder(tokenizer_json, ["two eggs"])
    assert isinstance(chosen, ReferenceEncoder) and "not installed" in facts["why_slow"]


# The oracle: R1's format written out by hand, character by character, with nothing of the library.

BOS, USER, ASSISTANT, EOS = demo.BOS, "<｜User｜>", "<｜Assistant｜>", demo.EOS
PIECES = [
    "two ", "eggs\n", "\n\n", "  ", "数学", "🙂", "👩‍👩‍👧", "e\u0301", "\u212b", "<b>", "</think", "x<", "%}", 
    "{{ 1 }}", "\t", "naïve ", "\u200b", "한", "़", "12,345", "\\boxed{4}", "'ll", "\r\n", "a" * 40,
]  # fmt: skip


def random_text(rng) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, 8))).strip() or "x"


def random_messages(rng) -> list[dict]:
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.2 else []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        thought = f"<think>\n{random_text(rng)}\n</think>\n\n"
        answer = ("<short>" if rng.random() < 0.5 else thought) + random_text(rng)
        messages += [{"role": "user", "content": random_text(rng)}, {"role": "assistant", "content": answer}]
    return messages


def oracle(messages: list[dict]) -> list[tuple[str, bool]]:
    """Pieces of text and whether each is trained."""
    pieces = [(BOS, False)] + [(m["content"], False) for m in messages if m["role"] == "system"]
    for m in messages:
        if m["role"] == "user":
            pieces.append((USER + m["content"], False))
        elif m["role"] == "assistant":
            pieces += [(ASSISTANT, False), (m["content"] + EOS, True)]
    return pieces


def oracle_masks(tokenizer, chats: list[list[dict]]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each conversation."""
    pieces = [oracle(messages) for messages in chats]
    texts = ["".join(text for text, _ in each) for each in pieces]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    flags = [[int(flag) for text, flag in each for _ in text] for each in pieces]
    masks = [
        [own[start] for start, _ in offsets] for own, offsets in zip(flags, encoding["offset_mapping"], strict=True)
    ]
    return list(zip(encoding["input_ids"], masks, strict=True))


def check_against_oracle(tokenizer, conversations: list[list[dict]]) -> int:
    """Compare the encoders in blocks, like the rows of a file; return the number of conversations compared."""
    template, rows, (reference, *fast) = ChatTemplate.of(tokenizer), 0, encoders(tokenizer)
    for start in range(0, len(conversations), 100):
        chats = conversations[start : start + 100]
        texts, spans = zip(*trained_texts(template, chats), strict=True)
        expected = oracle_masks(tokenizer, chats)
        for encoder in fast or [reference]:
            for found, (ids, mask), messages in zip(encoder.encode(texts, spans), expected, chats, strict=True):
                assert found.ids.tolist() == ids and found.loss_mask.tolist() == mask, messages
                rows += 1
    return rows


def test_the_mask_is_that_of_an_oracle_on_ten_thousand_conversations(tokenizer):
    rng = random.Random(0)
    assert check_against_oracle(tokenizer, [random_messages(rng) for _ in range(10_000)]) == 10_000


@needs_real
def test_the_mask_is_that_of_an_oracle_on_real_traces_with_r1s_tokenizer(tmp_path):
    from rsft_lib.data.records import read_records

    patch_tokenizer(Path(REAL) / "tokenizers" / "r1-distill-qwen", tmp_path / "r1", SHORT)
    long, short = (
        [to_messages(record, place) for place, record in read_records(Path(REAL) / "data" / name)]
        for name in ("long_planbench_r1.jsonl.gz", "short_gsm8k_train.jsonl")
    )
    rows = long + short if LONG else long[::16] + short[::4]
    assert check_against_oracle(load_tokenizer(tmp_path / "r1"), rows) == len(rows) > 1500
