"""Renaming tokens in every file, and preparing templates for training.

RSFT_REAL_DATA=FOLDER runs each test on R1's own tokenizer as well.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
from real import REAL, needs_real
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from rsft_lib import demo
from rsft_lib.common.artifact import read_manifest
from rsft_lib.tokenizer.chat import ChatTemplate, encode, prompt_ids
from rsft_lib.tokenizer.contract import TEXTS, check_contract
from rsft_lib.tokenizer.fitting import training_template
from rsft_lib.tokenizer.formats import R1_CHAT_TEMPLATE, is_ours
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

SHORT = {"<|quad_start|>": "<short>"}


def fitted(template: str, newline: bool = False) -> str:
    """The training template for R1's tokens."""
    return training_template(ChatTemplate(template, {"bos_token": demo.BOS}), newline)[0].source


NEW = fitted(R1_CHAT_TEMPLATE)
FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def as_it_comes(name: str, folder: Path) -> Path:
    """A tokenizer folder: the demo's, or R1's."""
    if name == "demo":
        return demo.make_model(folder, seed=0)
    return shutil.copytree(Path(REAL) / "tokenizers" / "r1-distill-qwen", folder)


@pytest.fixture(scope="module", params=["demo", pytest.param("real", marks=needs_real)])
def base(request, tmp_path_factory) -> Path:
    return as_it_comes(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(
    scope="module",
    params=["demo, transformers 4", "demo, transformers 5", pytest.param("real, transformers 4", marks=needs_real)],
)
def source(request, tmp_path_factory) -> Path:
    """A folder as saved by transformers 4.4x, with everything in the config, and the small one as by 5.x too."""
    name, version = request.param.split(", ")
    base = as_it_comes(name, tmp_path_factory.mktemp("base") / name)
    folder = tmp_path_factory.mktemp("source") / base.name
    load_tokenizer(base).save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    if version == "transformers 4":
        as_transformers_4(folder)
    return folder


def as_transformers_4(folder: Path) -> None:
    added = read(folder / "tokenizer.json")["added_tokens"]
    config = read(folder / "tokenizer_config.json") | {
        "added_tokens_decoder": {str(token["id"]): {flag: token[flag] for flag in FLAGS} for token in added},
        "additional_special_tokens": ["<|quad_start|>", "<|quad_end|>"],
        "chat_template": (folder / "chat_template.jinja").read_text(encoding="utf-8"),
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "chat_template.jinja").unlink()
    write(folder / "tokenizer_config.json", config)
    specials = [{flag: token[flag] for flag in FLAGS[:-1]} for token in added if token["content"] in SHORT]
    roles = {role: config[role] for role in ("bos_token", "eos_token", "pad_token")}
    write(folder / "special_tokens_map.json", roles | {"additional_special_tokens": specials})
    write(folder / "added_tokens.json", {token["content"]: token["id"] for token in added})


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def patched(source) -> Path:
    folder = source.with_name(f"{source.name}-patched")
    patch_tokenizer(source, folder, SHORT)
    return folder


def test_every_file_names_the_new_token_where_it_named_the_old_one_and_says_no_more_that_it_is_special(source, patched):
    for path in patched.iterdir():
        if path.name != "manifest.json":
            assert "quad_start" not in path.read_text(encoding="utf-8"), path.name
    number = load_tokenizer(source).convert_tokens_to_ids("<|quad_start|>")
    (token,) = [token for token in read(patched / "tokenizer.json")["added_tokens"] if token["id"] == number]
    assert token["content"] == "<short>" and token["special"] is False
    if (patched / "added_tokens.json").exists():
        decoder = read(patched / "tokenizer_config.json")["added_tokens_decoder"]
        assert decoder[str(number)]["content"] == "<short>" and decoder[str(number)]["special"] is False
        assert read(patched / "added_tokens.json")["<short>"] == number
        assert read(patched / "tokenizer_config.json")["additional_special_tokens"] == ["<|quad_end|>"]
        assert read(patched / "special_tokens_map.json")["additional_special_tokens"] == []


def test_nothing_else_in_the_tokenizer_changes(source, patched):
    before, after = ((folder / "tokenizer.json").read_text("utf-8").split("\n") for folder in (source, patched))
    changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new]
    assert changed == ['"content": "<short>",', '"special": false']


def test_ids_vocabulary_and_other_text_stay_and_every_way_to_load_agrees(source, patched):
    before, after = load_tokenizer(source), load_tokenizer(patched)
    assert len(after) == len(before) == Tokenizer.from_file(str(patched / "tokenizer.json")).get_vocab_size()
    assert after("<short>", add_special_tokens=False)["input_ids"] == [before.convert_tokens_to_ids("<|quad_start|>")]
    assert after("<short>hi").tokens()[-1] == before("hi").tokens()[-1]
    automatic = AutoTokenizer.from_pretrained(patched)
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"] == automatic(text)["input_ids"]
    assert automatic.chat_template == after.chat_template == NEW


def test_the_template_is_where_the_folder_had_it(source, patched):
    inline = "chat_template" in read(source / "tokenizer_config.json")
    assert ("chat_template" in read(patched / "tokenizer_config.json")) == inline
    assert (patched / "chat_template.jinja").exists() == (not inline)


def test_the_source_is_untouched_and_only_files_of_the_tokenizer_are_copied(source, tmp_path):
    crowded = shutil.copytree(source, tmp_path / "crowded")
    for name in ("model.safetensors", "pytorch_model.bin", "README.md", "modeling.py", "vocab.txt.bak"):
        (crowded / name).write_text("x")
    before = hashes(crowded)
    patch_tokenizer(crowded, tmp_path / "out", SHORT)
    assert hashes(crowded) == before
    assert hashes(tmp_path / "out").keys() == hashes(source).keys() | {"manifest.json"}


def test_a_file_that_names_no_token_is_copied_byte_for_byte(model, tmp_path):
    text = f'{{"eos_token_id":{load_tokenizer(model).eos_token_id} , "top_p": 1e0}}'
    (model / "generation_config.json").write_text(text)
    patch_tokenizer(model, tmp_path / "out", SHORT)
    assert (tmp_path / "out" / "generation_config.json").read_text() == text


def test_patching_twice_gives_the_same_bytes(source, patched):
    before = hashes(patched)
    patch_tokenizer(source, patched, SHORT)
    assert hashes(patched) == before


def test_a_patched_folder_is_copied_unchanged_with_a_message(patched, tmp_path, capsys):
    facts = patch_tokenizer(patched, tmp_path / "again", SHORT)
    assert "'<short>' already exists" in capsys.readouterr().out
    assert facts["changes"] == {} and facts["template_diff"] == ""
    old, new = hashes(patched), hashes(tmp_path / "again")
    assert old.pop("manifest.json") and new.pop("manifest.json") and old == new


def test_several_tokens_are_replaced_at_once(source, tmp_path):
    facts = patch_tokenizer(source, tmp_path / "out", SHORT | {"<|quad_end|>": "<long>"})
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    for old, new in facts["replacements"].items():
        assert after.convert_tokens_to_ids(new) == before.convert_tokens_to_ids(old) == facts["ids"][new]
    assert not check_contract(tmp_path / "out").failed


def test_the_manifest_has_the_inputs_and_what_changes(source, patched):
    manifest = read_manifest(patched)
    assert manifest["source"] == str(source) and len(manifest["source_sha256"]) == 64 and manifest["template"] == ""
    assert manifest["template_sha256"] == hashlib.sha256(NEW.encode()).hexdigest()
    assert (
        manifest["changes"]["prompt"] == "the prompt ends where the answer begins: the model writes the control token"
    )
    assert manifest["changes"]["thoughts in two turns"] == "the chain of thought is kept in every turn"
    assert not {"plain", "system", "two turns"} & manifest["changes"].keys()
    assert "+</think>" in manifest["template_diff"] and manifest["ids"].keys() == {
        "<think>",
        "<short>",
        "</think>",
    }


def test_autotokenizer_builds_the_byte_level_tokenizer_from_the_patched_config(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "source")
    config = read(folder / "tokenizer_config.json")
    write(folder / "tokenizer_config.json", config | {"tokenizer_class": "LlamaTokenizerFast"})
    patch_tokenizer(folder, tmp_path / "out", SHORT)
    assert read(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return demo.make_model(tmp_path_factory.mktemp("tiny") / "model", seed=0)


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(tiny, tmp_path / "model")


def test_places_that_few_tokenizers_have_are_edited_too(model, tmp_path):
    content, config = read(model / "tokenizer.json"), read(model / "tokenizer_config.json")
    (number,) = (token["id"] for token in content["added_tokens"] if token["content"] == "<|quad_start|>")
    content["model"]["vocab"] |= {token["content"]: token["id"] for token in content["added_tokens"]}
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<|quad_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<|quad_start|>": {"id": "<|quad_start|>", "ids": [number], "tokens": ["<|quad_start|>"]}},
    }  # fmt: skip
    write(model / "tokenizer.json", content)
    write(
        model / "tokenizer_config.json",
        config | {"extra_special_tokens": ["<|quad_start|>", "<|quad_end|>"]},
    )
    write(model / "vocab.json", {"a": 0, "<|quad_start|>": number})
    patch_tokenizer(model, tmp_path / "out", SHORT)
    content = read(tmp_path / "out" / "tokenizer.json")
    assert content["model"]["vocab"]["<short>"] == number and "quad_start" not in json.dumps(content)
    assert content["post_processor"]["special_tokens"]["<short>"] == {
        "id": "<short>", "ids": [number], "tokens": ["<short>"],
    }  # fmt: skip
    assert read(tmp_path / "out" / "vocab.json") == {"a": 0, "<short>": number}
    assert read(tmp_path / "out" / "tokenizer_config.json")["extra_special_tokens"] == ["<|quad_end|>"]


def refuse(model: Path, tmp_path: Path, message: str, replacements=SHORT, **options) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        patch_tokenizer(model, tmp_path / "out", replacements, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was left behind"


def test_tokens_that_cannot_be_replaced_are_refused_with_a_reason(model, tmp_path):
    refuse(model, tmp_path, "no added token '<none>' to replace; the added tokens are", {"<none>": "<short>"})
    refuse(
        model,
        tmp_path,
        r"cannot rename '<\|quad_start\|>' \(id \d+\): '<think>' is already a token \(id \d+\)",
        {"<|quad_start|>": "<think>"},
    )
    refuse(model, tmp_path, "is the tokenizer's (eos|pad)_token; choose", {"<｜end▁of▁sentence｜>": "<short>"})
    refuse(model, tmp_path, "two tokens cannot be renamed to the same", SHORT | {"<|quad_end|>": "<short>"})
    refuse(model, tmp_path, "'<short>' should be one token but has ids", {"<|quad_start|>": "<long>"})


def test_a_token_that_only_the_config_names_is_named(model, tmp_path):
    config = model / "tokenizer_config.json"
    write(config, read(config) | {"pad_token": "<pad>"})
    refuse(
        model, tmp_path, "tokenizer_config.json: pad_token is '<pad>', which tokenizer.json does not have: remove it"
    )


def test_a_vocabulary_of_sentencepiece_that_names_the_token_is_refused_and_another_is_copied(model, tmp_path):
    (model / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")
    patch_tokenizer(model, tmp_path / "fine", SHORT)
    assert (tmp_path / "fine" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    (model / "tokenizer.model").write_bytes(b"\n\x0e<|quad_start|>\x15")
    refuse(model, tmp_path, "in a sentencepiece vocabulary, which cannot be edited")


def test_files_that_disagree_as_the_originals_do_are_refused_until_a_replacement_settles_it(base, tmp_path):
    """The original's instructions contain `<|short|>` in one file and `<short>` in the other."""
    model = shutil.copytree(base, tmp_path / "model")
    content, config = read(model / "tokenizer.json"), read(model / "tokenizer_config.json")
    (token,) = (token for token in content["added_tokens"] if token["content"] == "<|quad_start|>")
    token |= {"content": "<short>", "special": False}
    write(model / "tokenizer.json", content)
    config["added_tokens_decoder"] = {str(t["id"]): {flag: t[flag] for flag in FLAGS} for t in content["added_tokens"]}
    config["added_tokens_decoder"][str(token["id"])]["content"] = "<|short|>"
    write(model / "tokenizer_config.json", config)
    size = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab_size()
    assert len(load_tokenizer(model)) == size + 1, "a phantom"
    refuse(model, tmp_path, rf"calls token {token['id']} '<\|short\|>', tokenizer.json calls it '<short>'")
    facts = patch_tokenizer(model, tmp_path / "out", {"<|short|>": "<short>"})
    assert facts["ids"]["<short>"] == token["id"] and len(load_tokenizer(tmp_path / "out")) == facts["vocab_size"]
    assert not check_contract(tmp_path / "out").failed


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def test_other_templates_are_refused_with_what_to_do_and_one_of_your_own_is_taken_as_it_is(model, tmp_path):
    set_template(model, "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    refuse(model, tmp_path, "unknown chat format: .*user: How many.*; known are R1 .*set `template` to the file")
    set_template(model, R1_CHAT_TEMPLATE.replace("'<｜User｜>' +", "'<｜User｜>' * loop.index +"))
    refuse(model, tmp_path, "like that of R1, but writes the sample chat 'two turns' as .*set `template` to the file")
    set_template(model, R1_CHAT_TEMPLATE + "{{ functions | length + 1 > tools | length }}")
    refuse(model, tmp_path, "template fails on a question and its answer: .*TypeError.*set `template` to the file")
    set_template(model, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    refuse(model, tmp_path, "own chat template cannot be rendered: .*more than 4 seconds")
    (tmp_path / "own.jinja").write_text(NEW + "{# mine #}", encoding="utf-8")
    patch_tokenizer(model, tmp_path / "out", SHORT, template=tmp_path / "own.jinja")
    assert load_tokenizer(tmp_path / "out").chat_template == NEW + "{# mine #}"
    (model / "chat_template.jinja").unlink()
    refuse(model, tmp_path, "has no chat template; set `template` to a file with one")


@pytest.mark.parametrize("differing", ["config.json", "chat_template.jinja"])
def test_the_tokenizer_of_another_model_with_the_same_vocabulary_is_another_one(model, tmp_path, differing):
    sibling, moved = (shutil.copytree(model, tmp_path / name) for name in ("sibling", "moved"))
    patch_tokenizer(model, tmp_path / "out", SHORT)
    patch_tokenizer(moved, tmp_path / "out", SHORT, trailing_newline=True)
    if differing == "config.json":
        write(sibling / differing, read(sibling / differing) | {"hidden_size": 8192})
    else:
        set_template(sibling, load_tokenizer(tmp_path / "out").chat_template)
    with pytest.raises(FileExistsError, match="out was made from .*moved and is not replaced by .* from .*sibling"):
        patch_tokenizer(sibling, tmp_path / "out", SHORT)
    patch_tokenizer(sibling, tmp_path / "out", SHORT, overwrite=True)


def test_a_tokenizer_with_another_template_of_your_own_is_another_one(model, tmp_path):
    mine, other = tmp_path / "mine.jinja", tmp_path / "other.jinja"
    mine.write_text(NEW + "{# mine #}")
    other.write_text(NEW + "{# other #}")
    patch_tokenizer(model, tmp_path / "out", SHORT)
    with pytest.raises(FileExistsError, match="is not replaced by output made from .*mine.jinja: .*set `overwrite`"):
        patch_tokenizer(model, tmp_path / "out", SHORT, template=mine)
    patch_tokenizer(model, tmp_path / "out", SHORT, template=mine, overwrite=True)
    with pytest.raises(FileExistsError, match="out was made from .*mine.jinja and is not .* made from no template: "):
        patch_tokenizer(model, tmp_path / "out", SHORT)
    mine.write_text(NEW + "{# edited #}")
    patch_tokenizer(model, tmp_path / "out", SHORT, template=mine)
    with pytest.raises(FileExistsError, match="out was made from .*mine.jinja and is not replaced by .*other.jinja"):
        patch_tokenizer(model, tmp_path / "out", SHORT, template=other)


def test_of_several_templates_the_default_one_is_used_and_others_are_reported(model, tmp_path, capsys):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    patch_tokenizer(model, tmp_path / "out", SHORT)
    assert "the chat template 'default' is used; tool_use are left out" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "out").chat_template == NEW
    (model / "chat_template.jinja").rename(model / "additional_chat_templates" / "rag.jinja")
    refuse(model, tmp_path, r"has several chat templates \(.*\), none named 'default'")


@pytest.mark.parametrize("named", [["default"], ["chat"], ["rag", "default"]])
def test_named_templates_in_the_config_become_one(model, tmp_path, named):
    config = read(model / "tokenizer_config.json")
    (model / "chat_template.jinja").unlink()
    entries = [{"name": name, "template": R1_CHAT_TEMPLATE if name != "rag" else "x"} for name in named]
    write(model / "tokenizer_config.json", config | {"chat_template": entries})
    patch_tokenizer(model, tmp_path / "out", SHORT)
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == NEW
    assert not check_contract(tmp_path / "out").failed


def test_the_newline_of_the_originals_prompts_is_in_training_text_too(base, tmp_path):
    patch_tokenizer(base, tmp_path / "out", SHORT, trailing_newline=True)
    tokenizer = load_tokenizer(tmp_path / "out")
    chat = [{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": "<short>4"}]
    assert tokenizer.decode(prompt_ids(tokenizer, chat[:1])).endswith("<｜User｜>2 + 2 ?<｜Assistant｜>\n")
    encoded = encode(tokenizer, chat)
    trained = [i for i, m in zip(encoded.ids, encoded.loss_mask, strict=True) if m]
    assert tokenizer.decode(trained) == f"<short>4{demo.EOS}" and "<｜Assistant｜>\n<short>" in tokenizer.decode(
        encoded.ids
    )
    assert not check_contract(tmp_path / "out").failed


ORIGINALS_EDITS = {"content.split('</think>')[-1]": "content", "<｜Assistant｜><think>\\n": "<｜Assistant｜>\\n"}


def test_templates_that_were_edited_before_end_as_the_stock_one_does():
    """The first release of R1's, the original's by hand, what this kit once wrote, and its other option."""
    original = R1_CHAT_TEMPLATE
    for old, new in ORIGINALS_EDITS.items():
        assert old in original
        original = original.replace(old, new)
    first, early = (
        text.replace("<｜Assistant｜><think>\\n", "<｜Assistant｜>") for text in (R1_CHAT_TEMPLATE, original)
    )
    with_newline = fitted(R1_CHAT_TEMPLATE, True)
    for template in (R1_CHAT_TEMPLATE, original, first, early, with_newline, NEW):
        assert fitted(template) == NEW and fitted(template, True) == with_newline != NEW
    assert is_ours(NEW) and is_ours(with_newline) and not is_ours(NEW + " ")


def plain(template: str) -> str:
    """The template without `{% generation %}`, for engines that do not know it."""
    return re.sub(r"{%-? (end)?generation -?%}", "", template)


def test_without_its_marks_the_template_says_the_same(patched):
    tokenizer = load_tokenizer(patched)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\n c "}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert environment.from_string(plain(NEW)).render(messages=chat, bos_token=demo.BOS) == expected
    with pytest.raises(jinja2.TemplateSyntaxError):
        environment.from_string(NEW)


NEW_TOKENS = ("<short>", "<x>")


@pytest.mark.parametrize("version", ["transformers 4", "transformers 5"])
def test_new_tokens_follow_the_last_one_in_every_file_and_other_text_stays(model, tmp_path, version):
    if version == "transformers 4":
        as_transformers_4(model)
    facts = patch_tokenizer(model, tmp_path / "out", {}, new_tokens=NEW_TOKENS)
    before, after = load_tokenizer(model), load_tokenizer(tmp_path / "out")
    last, short = len(before), after.convert_tokens_to_ids("<short>")
    assert [after.convert_tokens_to_ids(token) for token in NEW_TOKENS] == [last, last + 1] == [short, short + 1]
    assert len(after) == last + 2 == facts["vocab_size"] and facts["ids"]["<short>"] == last
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a<short>b")["input_ids"].count(last) == 1
    for text in TEXTS:
        assert after(text)["input_ids"] == before(text)["input_ids"]
    if version == "transformers 4":
        assert read(tmp_path / "out" / "added_tokens.json")["<x>"] == last + 1
        assert not read(tmp_path / "out" / "tokenizer_config.json")["added_tokens_decoder"][str(last)]["special"]
    assert not check_contract(tmp_path / "out").failed
    again = patch_tokenizer(tmp_path / "out", tmp_path / "again", {}, new_tokens=NEW_TOKENS)
    assert again["new_tokens"] == [] and again["vocab_size"] == facts["vocab_size"] and again["changes"] == {}


def test_where_a_new_token_has_its_row_is_said(model, tmp_path):
    facts = patch_tokenizer(model, tmp_path / "spare", {}, new_tokens=["<short>"])
    assert "a spare row" in facts["changes"]["<short>"], "the tiny model has more rows than tokens"
    write(model / "config.json", read(model / "config.json") | {"vocab_size": facts["ids"]["<short>"]})
    facts = patch_tokenizer(model, tmp_path / "new", {}, new_tokens=["<short>"])
    assert "a new row of the embedding, added by notebook 02" in facts["changes"]["<short>"]


def test_new_tokens_that_cannot_be_added_are_refused(model, tmp_path):
    refuse(model, tmp_path, "must not be empty or begin or end with white space", {}, new_tokens=["<short> "])
    refuse(model, tmp_path, "no tokens are given: set replacements", {})


def as_base_model(model: Path) -> None:
    """EOS is another token than the one with which the template ends answers, in every file."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).is_file():
            write(model / name, read(model / name) | {"eos_token": "<|EOT|>"})
    number = load_tokenizer(model).convert_tokens_to_ids("<|EOT|>")
    for name in ("config.json", "generation_config.json"):
        write(model / name, read(model / name) | {"eos_token_id": number})


@pytest.mark.parametrize("eos", ["", demo.EOS])
def test_eos_becomes_the_token_that_ends_answers_in_every_file(model, tmp_path, eos):
    as_base_model(model)
    facts = patch_tokenizer(model, tmp_path / "out", SHORT, eos=eos)
    tokenizer = load_tokenizer(tmp_path / "out")
    end = tokenizer.convert_tokens_to_ids(demo.EOS)
    assert facts["changes"]["EOS"] == f"{demo.EOS}, with which the template ends answers, in place of <|EOT|>"
    assert tokenizer.eos_token_id == end == read(tmp_path / "out" / "config.json")["eos_token_id"]
    stops = read(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert stops == [end, tokenizer.convert_tokens_to_ids("<|EOT|>")]
    assert not check_contract(tmp_path / "out").failed


def test_an_eos_that_does_not_end_answers_or_does_not_exist_is_refused(model, tmp_path):
    refuse(model, tmp_path, "the training template ends answers with '<｜end.of.sentence｜>'; leave eos", eos="<|EOT|>")
    (tmp_path / "own.jinja").write_text(NEW)
    refuse(model, tmp_path, "'<none>', which is not a token", template=tmp_path / "own.jinja", eos="<none>")


def test_the_special_flags_of_control_tokens_are_cleared_in_every_file(model, tmp_path):
    as_transformers_4(model)
    content, config = read(model / "tokenizer.json"), read(model / "tokenizer_config.json")
    for token in (*content["added_tokens"], *config["added_tokens_decoder"].values()):
        token["special"] |= token["content"] in ("<think>", "</think>")
    write(model / "tokenizer.json", content)
    write(model / "tokenizer_config.json", config | {"additional_special_tokens": ["<think>", "<|EOT|>"]})
    facts = patch_tokenizer(model, tmp_path / "out", SHORT)
    assert facts["changes"]["special flag"].startswith("cleared for </think>, <think>: ")
    assert read(tmp_path / "out" / "tokenizer_config.json")["additional_special_tokens"] == ["<|EOT|>"]
    assert not check_contract(tmp_path / "out").failed


def test_a_sentencepiece_vocabulary_alone_is_refused_with_what_to_do(model, tmp_path):
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="SentencePiece vocabulary but no tokenizer.json.*save_pretrained"):
        patch_tokenizer(model, tmp_path / "out", SHORT)
