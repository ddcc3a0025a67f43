"""From records to tokens, masks and packs, and what is refused: pytest tests/test_data.py"""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rsft_lib import demo
from rsft_lib.artifact import new_folder, verify
from rsft_lib.chat import MODES, encode, patch_template, prompt_ids
from rsft_lib.data.packing import pack
from rsft_lib.data.records import read_records, to_messages
from rsft_lib.data.store import MASK, TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer import load_tokenizer, patch_tokenizer

SHORT = {"<|quad_start|>": "<short>"}
THOUGHT = "<think>\ntwo plus two\n</think>\n\nAnswer: four"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return demo.make_model(tmp_path_factory.mktemp("data") / "model", seed=0)


@pytest.fixture(scope="module")
def patched(model):
    patch_tokenizer(model, model.with_name("patched"), SHORT)
    return model.with_name("patched")


def conversation(answer: str) -> list[dict]:
    return [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]


def test_the_mask_trains_the_answer_and_its_end_and_nothing_else(patched):
    """
    text   <bos> <｜User｜> How many ? <｜Assistant｜> <short> Answer : four <eos>
    mask     0      0      0   0  0       0           1      1    1   1     1
    """
    tokenizer = load_tokenizer(patched)
    encoded = encode(tokenizer, conversation("<short>Answer: four"))
    tokens = [tokenizer.decode([i]) for i in encoded.ids]
    expected = [demo.BOS, "<｜User｜>", "How many?", "<｜Assistant｜>"], ["<short>", "Answer", ":", " four", demo.EOS]
    edge = encoded.loss_mask.index(1)
    assert ["".join(tokens[:edge])] == ["".join(expected[0])]
    assert tokens[edge:] == expected[1]
    assert encoded.loss_mask == [0] * edge + [1] * 5


def test_every_assistant_turn_is_trained_and_no_header(patched):
    tokenizer = load_tokenizer(patched)
    encoded = encode(tokenizer, conversation("<short>one") + conversation(THOUGHT))
    trained = tokenizer.decode([i for i, m in zip(encoded.ids, encoded.loss_mask, strict=True) if m])
    assert trained == f"<short>one{demo.EOS}{THOUGHT}{demo.EOS}"


@pytest.mark.parametrize("mode", [None, *MODES])
def test_what_is_generated_from_is_how_training_text_begins(patched, mode):
    tokenizer = load_tokenizer(patched)
    answer = {"think": THOUGHT, "short": "<short>four", None: THOUGHT}[mode]
    prompt = prompt_ids(tokenizer, conversation("")[:1], mode)
    assert encode(tokenizer, conversation(answer)).ids[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<｜Assistant｜>" + MODES.get(mode, ""))


def test_a_template_that_strips_the_chain_of_thought_is_refused(model):
    with pytest.raises(ValueError, match="patch the template"):
        encode(load_tokenizer(model), conversation(THOUGHT))
    tokenizer = load_tokenizer(model)  # one whose generation prompt is right and which still strips
    tokenizer.chat_template = demo.R1_CHAT_TEMPLATE.replace("<think>\\n", "")
    with pytest.raises(ValueError, match="drops part of the answer"):
        encode(tokenizer, conversation(THOUGHT))


def test_patching_renames_the_token_everywhere_keeps_its_id_and_leaves_the_source(model, patched):
    before, after = load_tokenizer(model), load_tokenizer(patched)
    assert after.convert_tokens_to_ids("<short>") == before.convert_tokens_to_ids("<|quad_start|>")
    assert len(after) == len(before) and "<short>" not in before.get_added_vocab()
    assert after.decode(after("<short>hi")["input_ids"], skip_special_tokens=True) == "<short>hi"
    assert not any("<|quad_start|>" in path.read_text() for path in patched.glob("token*.json"))
    text = "Ben has two apples.\n\n12 + 3 数学 🙂"
    assert (
        after(text)["input_ids"]
        == before(text)["input_ids"]
        == AutoTokenizer.from_pretrained(patched)(text)["input_ids"]
    )
    assert patch_template(patch_template(demo.R1_CHAT_TEMPLATE)) == patch_template(demo.R1_CHAT_TEMPLATE)


def test_a_tokenizer_that_cannot_be_patched_is_refused_and_nothing_is_left(model, patched, tmp_path):
    for source, replacements, message in [
        (model, {"<none>": "<short>"}, "no added token '<none>' to replace; there are"),
        (model, {"<|quad_start|>": "<think>"}, "'<think>' is a token already"),
        (patched, SHORT, "is this folder patched"),
    ]:
        with pytest.raises(ValueError, match=message):
            patch_tokenizer(source, tmp_path / "out", replacements)
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        patch_tokenizer(tmp_path / "nowhere", tmp_path / "out", SHORT)
    with pytest.raises(ValueError, match="only R1's template"):
        patch_template("{{ messages }}")
    assert list(tmp_path.iterdir()) == []


GOOD = json.dumps({"instruction": "2 + 2 ?", "output": "<think>\nhm\n</think>\n\n4"})
BAD = {
    "{'instruction'": "no JSON",
    '{"instruction": "cut off': "no JSON",
    "[1, 2]": "found list, expected an object",
    '{"question": "x", "output": "y"}': r"found the fields \['output', 'question'\]",
    '{"instruction": "x", "output": "  "}': "output is '  ', expected a text that is not empty",
    '{"instruction": "x", "output": 4}': "output is 4",
    '{"instruction": "x", "output": "\\ud800"}': "half of a surrogate pair at character 0",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_used_is_named_and_nothing_is_left(line, patched, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=f"^{data}:2: .*{BAD[line]}"):
        tokenize(data, patched, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_missing_files_are_named(patched, tmp_path):
    with pytest.raises(FileNotFoundError, match="data file: .*none.jsonl does not exist"):
        tokenize(tmp_path / "none.jsonl", patched, tmp_path / "out")


def test_json_gzip_and_a_byte_order_mark_are_read(tmp_path):
    record = json.loads(GOOD)
    (tmp_path / "a.json").write_text(json.dumps([record]))
    (tmp_path / "b.jsonl").write_text("\ufeff" + GOOD + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(GOOD + "\n")
    for path in sorted(tmp_path.iterdir()):
        assert [(place, to_messages(r, place)[0]["content"]) for place, r in read_records(path)] == [
            (f"{path}:1", "2 + 2 ?")
        ]


def test_long_samples_are_dropped_and_an_exact_fit_is_not_long(patched, tmp_path):
    (tmp_path / "d.jsonl").write_text(GOOD + "\n")
    length = TokenStore(_tokens(tmp_path, patched, 16384)).lengths[0]
    assert len(TokenStore(_tokens(tmp_path, patched, length))) == 1
    with pytest.raises(ValueError, match=f"none of 1 records fits into max_length {length - 1} tokens"):
        _tokens(tmp_path, patched, length - 1)


def _tokens(folder: Path, tokenizer: Path, max_length: int) -> Path:
    tokenize(folder / "d.jsonl", tokenizer, folder / "out", int(max_length))
    return folder / "out"


def test_a_store_gives_back_ids_and_masks_as_int32_and_refuses_a_mask_of_another_size(patched, tmp_path):
    (tmp_path / "d.jsonl").write_text(GOOD + "\n")
    store = TokenStore(_tokens(tmp_path, patched, 100))
    encoded = encode(load_tokenizer(patched), to_messages(json.loads(GOOD), ""))
    tokens, mask = store[0]
    assert tokens.tolist() == encoded.ids and mask.tolist() == encoded.loss_mask and tokens.dtype == "int32"
    assert store.manifest["counts"] == {
        "records": 1, "dropped": 0, "tokens": len(tokens), "trained_tokens": int(mask.sum()), "think": 1,
    }  # fmt: skip
    verify(store.folder)
    with (store.folder / MASK).open("ab") as file:
        file.write(b"1")
    with pytest.raises(ValueError, match="tokenize again"):
        TokenStore(store.folder)


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    packs, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [space for space in free if space >= lengths[i]]
        if fitting:
            number = max(n for n, space in enumerate(free) if space == min(fitting))
        else:
            number = len(packs)
            packs.append([])
            free.append(capacity)
        packs[number].append(i)
        free[number] -= lengths[i]
    return packs


def test_packing_is_best_fit_decreasing_and_loses_nothing():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 60))]
        found, expected = pack(lengths, 40), best_fit_decreasing(lengths, 40)
        assert sorted(i for p in found for i in p) == list(range(len(lengths)))
        fills = [sorted(sum(lengths[i] for i in p) for p in packs) for packs in (found, expected)]
        assert fills[0] == fills[1]
    with pytest.raises(ValueError, match="sample 1 needs 41 positions, a pack has 40"):
        pack([1, 41], 40)


def test_a_step_that_fails_leaves_the_folder_of_before_and_foreign_ones_are_kept(tmp_path):
    final = tmp_path / "out"
    with new_folder(final, {"made_by": "step"}) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(final, {"made_by": "step"}) as folder:
        (folder / "file").write_text("new")
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "old" and os.listdir(tmp_path) == ["out"]
    with pytest.raises(FileExistsError, match="was not written by another"), new_folder(final, {"made_by": "another"}):
        pass
    (final / "file").write_text("odl")
    with pytest.raises(ValueError, match="damaged or was edited"):
        verify(final)
