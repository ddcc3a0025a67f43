"""The contract on sound folders, on folders broken in one way each, and on templates that attack.

RSFT_REAL_DATA=FOLDER has sound folders and stock templates checked on R1's own tokenizer as well, and with
RSFT_LONG_TESTS=1 folders broken in one way too.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from real import LONG, REAL, needs_real

from rsft_lib import demo
from rsft_lib.common.artifact import read_manifest, write_manifest
from rsft_lib.common.sandbox import limited
from rsft_lib.tokenizer import contract, template_checks
from rsft_lib.tokenizer.chat import ChatTemplate, encode
from rsft_lib.tokenizer.contract import check_contract, require_contract
from rsft_lib.tokenizer.fitting import training_template
from rsft_lib.tokenizer.formats import R1_CHAT_TEMPLATE
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.tokenizer.template_clock import MOMENTS

SHORT = {"<|quad_start|>": "<short>"}
NEW = training_template(ChatTemplate(R1_CHAT_TEMPLATE, {"bos_token": demo.BOS}))[0].source
EOS = "{{- '<｜end▁of▁sentence｜>' }}"
LOOP = "{%- set ns = namespace"  # precedes the loop over messages


BOTH = ["demo", pytest.param("real", marks=needs_real)]


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Callable[[str], Path]:
    """The patched folder of a tokenizer, with its source beside it."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        if name == "demo":
            demo.make_model(folder / "source", seed=0)
        else:
            shutil.copytree(Path(REAL) / "tokenizers" / "r1-distill-qwen", folder / "source")
        patch_tokenizer(folder / "source", folder / "patched", SHORT)
        return folder / "patched"

    return make


@pytest.fixture(scope="module", params=BOTH)
def sound(request, patched) -> Path:
    return patched(request.param)


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    """A copy to break."""
    return shutil.copytree(sound, tmp_path / "folder")


@pytest.fixture(params=BOTH if LONG else BOTH[:1])
def small(request, patched, tmp_path) -> Path:
    """A copy to break; without RSFT_LONG_TESTS only of the demo tokenizer."""
    return shutil.copytree(patched(request.param), tmp_path / "small")


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def broken(folder: Path, spoil: Callable[[Path], None], **facts) -> set[str]:
    """The checks that fail after `spoil`, with the manifest rewritten so that the file hashes match."""
    spoil(folder)
    write_manifest(folder, {key: value for key, value in (read_manifest(folder) | facts).items() if key != "files"})
    return {check.name for check in check_contract(folder).failed}


def with_tokens(edit: Callable[[dict[str, dict]], None]) -> Callable[[Path], None]:
    """Edit the added tokens in every file that lists them."""

    def spoil(folder: Path) -> None:
        content, config = read(folder / "tokenizer.json"), read(folder / "tokenizer_config.json")
        edit({token["content"]: token for token in content["added_tokens"]})
        write(folder / "tokenizer.json", content)
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] = {
                str(token["id"]): {flag: token[flag] for flag in token if flag != "id"}
                for token in content["added_tokens"]
            }
            write(folder / "tokenizer_config.json", config)

    return spoil


def template(old: str, new: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        assert NEW.count(old) >= 1, old
        (folder / "chat_template.jinja").write_text(NEW.replace(old, new), encoding="utf-8")

    return spoil


def swap_two_letters(folder: Path) -> None:
    content = read(folder / "tokenizer.json")
    vocab = content["model"]["vocab"]
    vocab["x"], vocab["z"] = vocab["z"], vocab["x"]
    write(folder / "tokenizer.json", content)


def swap_names(tokens: dict[str, dict]) -> None:
    one, other = tokens["<short>"], tokens["<|quad_end|>"]
    for key in ("content", "special"):
        one[key], other[key] = other[key], one[key]


def rename_end_of_thought(tokens: dict[str, dict]) -> None:
    tokens["</think>"]["content"] = "</thinking>"


def set_flag(flag: str) -> Callable[[dict[str, dict]], None]:
    return lambda tokens: tokens["<short>"].update({flag: True})


def add_a_token(folder: Path) -> None:
    content = read(folder / "tokenizer.json")
    last = max(content["added_tokens"], key=lambda token: token["id"])
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<phantom>"})
    write(folder / "tokenizer.json", content)
    with_tokens(lambda tokens: None)(folder)


def disagree(folder: Path) -> None:
    ids = load_tokenizer(folder).get_added_vocab()
    ids["<|EOT|>"], ids["<|quad_end|>"] = ids["<|quad_end|>"], ids["<|EOT|>"]
    write(folder / "added_tokens.json", ids)


def stop_elsewhere(folder: Path) -> None:
    write(folder / "generation_config.json", {"eos_token_id": [5, 6]})


BREAKS = {
    "files agree": disagree,
    "one token each": with_tokens(rename_end_of_thought),
    "ids kept": with_tokens(swap_names),
    "vocabulary kept": add_a_token,
    "control tokens are read": with_tokens(set_flag("special")),
    "control tokens round-trip": with_tokens(set_flag("rstrip")),
    "generation stops": stop_elsewhere,
    "other text as before": swap_two_letters,
    "template renders": template("{%- endfor %}", ""),
    "same at any time": template(f'"plain": ["{demo.BOS}"]', f'"plain": ["{demo.BOS}" + strftime_now("%d")]'),
    "prompt begins text": template("prompt %}\n    {{- settings.header", "prompt %}\n    {{- settings.header + '\\n'"),
    "thought survives": template(
        "'' + message.content }}\n{%- endif %}\n",
        "(message.content if loop.last else message.content.split('</think>')[-1]) }}\n{%- endif %}\n",
    ),
    "messages in order": template("else '' + messages[0].content", "else ''"),
    "BOS not doubled": template(f'["{demo.BOS}', f'["{demo.BOS * 2}'),
    "end is trained": template(
        f"{EOS}\n        {{%- endgeneration %}}", f"{{%- endgeneration %}}\n        {EOS}"
    ),
    "header is not trained": template(
        "{{- settings.header }}\n        {%- generation %}", "{%- generation %}\n        {{- settings.header }}"
    ),
    "tool calls": template(EOS, "{{- '' if message.tool_calls else '<｜end▁of▁sentence｜>' }}"),
}  # fmt: skip


def test_a_patched_folder_passes_every_check(sound):
    checks = check_contract(sound)
    assert [check.name for check in checks if check.passed is not True] == []
    covered = {"files are whole", "served alike", "mask as marked", *BREAKS}
    assert {check.name for check in checks} == covered, "each check has a way to fail below"
    require_contract(sound)


@pytest.mark.parametrize("name", BREAKS)
def test_a_folder_that_is_broken_in_one_way_fails_in_that_check_and_no_other(small, name):
    assert broken(small, BREAKS[name]) == {name}


def test_require_contract_lists_every_failed_check(small):
    BREAKS["generation stops"](small)
    BREAKS["BOS not doubled"](small)
    with pytest.raises(ValueError, match="(?s)breaks the contract.*files are whole: .*generation stops: .*BOS not dou"):
        require_contract(small)


def test_a_file_that_changed_since_is_named(small):
    with (small / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    (failed,) = check_contract(small).failed
    assert (
        failed.name == "files are whole"
        and failed.detail == "tokenizer_config.json changed since the folder was written"
    )
    (small / "manifest.json").unlink()
    checks = check_contract(small)
    assert [check.name for check in checks.failed] == ["files are whole"] and "no manifest" in checks.failed[0].detail
    unknown = [check.name for check in checks if check.passed is None]
    assert unknown == ["ids kept", "vocabulary kept", "other text as before"]


def test_a_tokenizer_that_autotokenizer_builds_differently_is_found(sound, folder):
    """It builds Qwen2's tokenizer from the model type and ignores the pre-tokenizer of tokenizer.json."""

    def cut_otherwise(place: Path) -> None:
        content = read(place / "tokenizer.json")
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\p{N}{1,3}|[^\p{N}]+"}
        write(place / "tokenizer.json", content)

    source = shutil.copytree(sound.with_name("source"), folder.with_name("source"))
    cut_otherwise(source)
    assert broken(folder, cut_otherwise, source=str(source)) == {"served alike"}


def test_a_mask_that_is_not_what_the_template_marks_is_found(sound, monkeypatch):
    marked = template_checks._marked

    def one_more(tokenizer, chat):
        ids, mask = marked(tokenizer, chat)
        return ids, [int(mask[i] or mask[min(i + 1, len(mask) - 1)]) for i in range(len(mask))]

    monkeypatch.setattr(template_checks, "_marked", one_more)
    assert [check.name for check in check_contract(sound).failed] == ["mask as marked"]


def test_white_space_after_eos_may_be_marked_and_is_not_trained(small):
    assert broken(small, template(EOS, EOS + "{{- '\\n' }}")) == set()


def test_white_space_that_the_prompt_ends_with_may_be_marked_and_is_not_trained(small):
    """As TRL's template for Qwen2.5 marks it, which also writes arguments as JSON whether they are a string or not."""
    header = "{{- settings.header }}\n        {%- generation %}"
    own = NEW.replace(header, header + "{{- '\n' }}")
    own = own.replace("prompt %}\n    {{- settings.header", "prompt %}\n    {{- settings.header + '\n'")
    own = own.replace("arguments if arguments is string else arguments | tojson", "arguments | tojson")
    assert broken(small, lambda place: (place / "chat_template.jinja").write_text(own, encoding="utf-8")) == set()
    chat = [{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": "4"}]
    encoded, tokenizer = encode(load_tokenizer(small), chat), load_tokenizer(small)
    trained = [number for number, kept in zip(encoded.ids, encoded.loss_mask, strict=True) if kept]
    assert tokenizer.decode(trained) == "4" + demo.EOS and "<｜Assistant｜>\n4" in tokenizer.decode(encoded.ids)


def test_a_template_may_refuse_system_messages(small):
    """As Mistral v0.1's does; rows with one are rejected with its words."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    assert broken(small, template(LOOP, refuses + LOOP)) == set()


def test_bos_may_be_absent_or_begin_every_message(small):
    assert broken(small, template(f'["{demo.BOS}', '["')) == set()
    marked = NEW.replace("'<｜User｜>'", f"'{demo.BOS}<｜User｜>'").replace(f'["{demo.BOS}', '["')
    assert broken(small, lambda place: (place / "chat_template.jinja").write_text(marked, encoding="utf-8")) == set()


def test_a_template_that_drops_the_tools_is_found(small):
    assert broken(small, template("for tool in tools", "for tool in []")) == {"tool calls"}


def test_a_folder_without_a_template_or_with_several_fails_a_check(small):
    assert broken(small, lambda place: (place / "chat_template.jinja").unlink()) == {"template renders"}
    (small / "additional_chat_templates").mkdir()
    (small / "additional_chat_templates" / "other.jinja").write_text("x")
    assert "template renders" in {check.name for check in check_contract(small).failed}


def test_the_stock_template_fails_because_it_strips_the_chain_of_thought(folder):
    failed = broken(folder, lambda place: (place / "chat_template.jinja").write_text(R1_CHAT_TEMPLATE, "utf-8"))
    assert failed == {"prompt begins text", "thought survives"}


def test_the_originals_hand_edited_template_fails_in_its_prompt_alone(folder):
    """Its prompts end with a newline that its training text lacks, and its tool calls have no end."""
    edited = R1_CHAT_TEMPLATE.replace("content.split('</think>')[-1]", "content").replace("<think>\\n", "\\n")
    failed = broken(folder, lambda place: (place / "chat_template.jinja").write_text(edited, "utf-8"))
    assert failed == {"prompt begins text"}


def test_a_corpus_is_compared_line_by_line(small, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("a plain line\nzebra\none that names <short>\n", encoding="utf-8")
    details = {check.name: check.detail for check in check_contract(small, corpus)}
    assert details["other text as before"] == "10 texts give the same tokens; 1 that contain a replaced token skipped"
    with pytest.raises(FileNotFoundError, match="corpus: .*none.txt does not exist"):
        check_contract(small, tmp_path / "none.txt")


ATTACKS = {
    "a loop without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a gigabyte": "{{ 'a' * 10**9 }}",
    "a gigabyte bit by bit": "{% for i in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}",
    "one comparison that never ends": "{% set ns = namespace(a=[0], b=[0]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
}


@pytest.fixture
def demo_folder(patched) -> Path:
    return patched("demo")


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_exhausts_time_or_memory_is_stopped_and_reported(demo_folder, tmp_path, name):
    own = tmp_path / "own.jinja"
    own.write_text(NEW + ATTACKS[name], encoding="utf-8")
    patch_tokenizer(demo_folder.with_name("source"), tmp_path / "out", SHORT, template=own)
    (failed,) = check_contract(tmp_path / "out").failed
    assert failed.name == "template renders"
    assert any(word in failed.detail for word in ("more than 4 seconds", "more than 512 MiB", "killed by signal"))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ range(10**9) | list }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include 'MARK' %}",
    "{{ undefined.attribute }}",
]


@pytest.mark.parametrize("attack", ESCAPES)
def test_a_template_that_reaches_out_is_stopped_by_jinjas_sandbox(demo_folder, tmp_path, attack):
    tokenizer = load_tokenizer(demo_folder)
    tokenizer.chat_template = NEW + attack.replace("MARK", str(tmp_path / "mark"))
    with limited("rendering"):
        checks = template_checks._check(tokenizer)
    assert [check.name for check in checks.failed] == ["template renders"]
    assert not (tmp_path / "mark").exists()


IF_NO_SYSTEM = "{% if messages[0]['role'] != 'system' %}Today is {{ strftime_now('%Y-%m-%d') }}.{% endif %}"
CHANGING = [  # single parts of a date, dates in some conversations only, and randomness
    *(f"{{{{ strftime_now('{part}') }}}}" for part in ("%d", "%b", "%A", "%Y", "%H", "%M", "%p", "%j", "%C", "%x")),
    "{{ strftime_now('%d %b %Y') }}",
    "{{ strftime_now('%Y')[3] }}",
    "{% if strftime_now('%m') == '12' %}Merry Christmas{% endif %}",
    IF_NO_SYSTEM,
    "{% if tools %}{{ strftime_now('%H:%M') }}{% endif %}",
    "{% if add_generation_prompt %}{{ strftime_now('%H') }}{% endif %}",
    "{{ range(9) | random }}",
    "{{ lipsum() }}",
    "{% if tools and messages[0].role == 'system' %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length > 2 %}{{ strftime_now('%d') }}{% endif %}",
    "{% if messages[-1].reasoning_content %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    "{% if messages[-1].tool_calls and messages[0].role == 'system' %}{{ strftime_now('%A') }}{% endif %}",
    "{% if messages[-1].role == 'tool' and add_generation_prompt and tools %}{{ strftime_now('%H') }}{% endif %}",
    "{% if messages | length > 12 and not add_generation_prompt %}{{ strftime_now('%S') }}{% endif %}",
    "{% if strftime_now('%Y') | int > 2028 %}X{% endif %}",
    "{% if strftime_now('%M') | int < 20 %}X{% endif %}",
]
SELDOM = [  # different only on one day or in one of very many cases
    "{% if strftime_now('%d.%m.%Y') == '31.07.2031' %}X{% endif %}",
    "{% if strftime_now('%Y') > '9000' and strftime_now('%M%S') == '4711' %}X{% endif %}",
    "{% if strftime_now('%M%S') | int == 4711 %}X{% endif %}",
    "{% if strftime_now('%f') | float == 4711 %}X{% endif %}",
    "{% if strftime_now('%M%S') in ['4711'] %}X{% endif %}",
    "{% if strftime_now('%M%S') in '4711' %}X{% endif %}",
    "{% if '4711' in strftime_now('%M%S') %}X{% endif %}",
    "{% if strftime_now('%M%S').startswith('471') %}X{% endif %}",
    "{% if strftime_now('%M%S')[:3] == '471' %}X{% endif %}",
    "{% if 'x' ~ strftime_now('%M%S') == 'x4711' %}X{% endif %}",
    "{% if 'x' + strftime_now('%M%S') == 'x4711' %}X{% endif %}",
    "{% if '%s' % strftime_now('%M%S') == '4711' %}X{% endif %}",
    "{% if '{}'.format(strftime_now('%M%S')) == '4711' %}X{% endif %}",
    "{% if {'4711': 1}[strftime_now('%M%S')] %}X{% endif %}",
    "{% set ns = namespace(now=strftime_now('%M%S')) %}{% if ns.now | trim == '4711' %}X{% endif %}",
    "{% if [strftime_now('%M%S')] | select('equalto', '4711') | list %}X{% endif %}",
    "{% if [strftime_now('%M%S'), '4711'] | unique | list | length == 1 %}X{% endif %}",
    "{% if strftime_now('%M%S') == '4711' %}{{ raise_exception('no') }}{% endif %}",
    "{% if range(99999) | random == 4711 %}X{% endif %}",
]
KEPT = [  # reads the clock but does not inspect the value
    "{% set now = strftime_now('%d') %}",
    "{% set ns = namespace(now=strftime_now('%d')) %}{% set ns.now = '1 May' %}{{ ns.now }}",
    "{% set now = '1 May' if strftime_now is defined else strftime_now('%d') %}{{ now }}",
    "{% if not now is defined %}{% set now = strftime_now('%d') %}{% endif %}{{ '' if now is defined }}",
    "{% macro today(now) %}It is May.{% endmacro %}{{ today(strftime_now('%d')) }}",
]


def same_at_any_time(folder: Path, text: str) -> contract.Checks:
    """Only this check, on R1's template with `text` inserted before the first message."""
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = NEW.replace(LOOP, text + LOOP)
    return contract.Checks(check for check in template_checks._check(tokenizer) if check.name == "same at any time")


@pytest.mark.parametrize("text", CHANGING + SELDOM)
def test_a_template_whose_text_depends_on_when_it_is_rendered_is_refused(demo_folder, text):
    (check,) = same_at_any_time(demo_folder, text).failed
    assert "the text depends on when it is rendered" in check.detail
    if text in SELDOM:
        assert "strftime_now" in check.detail


@pytest.mark.parametrize("text", KEPT)
def test_a_template_may_ask_the_clock_as_long_as_nothing_comes_of_it(demo_folder, text):
    (check,) = same_at_any_time(demo_folder, text)
    assert check.passed, check.detail


def test_the_clocks_whose_texts_are_compared_differ_in_every_part_of_a_date():
    parts = "%Y %y %C %m %b %d %j %a %H %I %M %S %f %p".split()
    assert [part for part in parts if f"{MOMENTS[0]:{part}}" == f"{MOMENTS[-1]:{part}}"] == []


def test_both_texts_and_dates_are_shown_and_an_unused_clock_is_accepted(demo_folder, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(NEW.replace(LOOP, "Today: {{ strftime_now('%d %b %Y') }}" + LOOP), encoding="utf-8")
    patch_tokenizer(demo_folder.with_name("source"), tmp_path / "dated", SHORT, template=own)
    (failed,) = check_contract(tmp_path / "dated").failed
    assert "Today: 01 Jan 1998" in failed.detail and "Today: 02 Feb 1999" in failed.detail
    with pytest.raises(ValueError, match="same at any time: "):
        require_contract(tmp_path / "dated")
    own.write_text("{% set today = strftime_now('%d') %}" + NEW, encoding="utf-8")
    patch_tokenizer(demo_folder.with_name("source"), tmp_path / "undated", SHORT, template=own)
    assert not check_contract(tmp_path / "undated").failed


def test_the_table_shows_results_and_escapes_text_from_templates(demo_folder, tmp_path):
    folder = shutil.copytree(demo_folder, tmp_path / "folder")
    checks = check_contract(folder)
    assert repr(checks).splitlines()[0].startswith("ok    files are whole ")
    broken(folder, lambda place: (place / "chat_template.jinja").write_text("{{ raise_exception('<script>') }}"))
    checks = check_contract(folder)
    assert "FAIL  template renders" in repr(checks) and "\n-     prompt begins text" in repr(checks)
    assert "&lt;script&gt;" in checks._repr_html_() and "<script>" not in checks._repr_html_()


def test_limits_hold_for_a_block_and_are_gone_after_it():
    with (
        pytest.raises(ValueError, match="^a list takes more than 64 MiB of memory$"),
        limited("a list", memory=64 << 20),
    ):
        bytearray(200 << 20)
    assert len(bytearray(200 << 20)) == 200 << 20
    with pytest.raises(ValueError, match="^waiting takes more than 1 seconds$"), limited("waiting", seconds=1):
        while True:
            pass
    with pytest.raises(KeyError), limited("another error"):
        raise KeyError


@needs_real
@pytest.mark.parametrize(
    ("family", "tokens"),
    [("mistral-nemo", "[control_{}]"), ("llama3.1", "<|reserved_special_token_{}|>")],
    ids=["SentencePiece's spaces", "no thinking tokens"],
)
def test_real_tokenizers_of_other_formats_pass(family, tokens, tmp_path):
    names = zip((8, 9, 10), ("<short>", "<think>", "</think>"), strict=True)
    renamed = {tokens.format(number): name for number, name in names}
    source = shutil.copytree(Path(REAL).parent / "cases" / "families" / family, tmp_path / "source")
    write(source / "config.json", {"model_type": "llama"})  # as TinyLlama
    patch_tokenizer(source, tmp_path / "out", renamed)
    assert not check_contract(tmp_path / "out").failed
