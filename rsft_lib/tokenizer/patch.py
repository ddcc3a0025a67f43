"""Tokenizer patching: rename unused tokens to control tokens in every tokenizer file."""

import hashlib
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rsft_lib.common.artifact import file_hash, new_folder
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.common.visible import visible
from rsft_lib.tokenizer.dialect import SHORT, THINKLESS, dialect_of
from rsft_lib.tokenizer.templates import patch_template, template_diff

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

# AutoTokenizer reads the model type from config.json; generation_config.json has the EOS id.
FILES = [
    TOKENIZER, CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json", "generation_config.json",
]  # fmt: skip

# Keys under which tokenizer files list special tokens other than BOS, EOS and padding. Control tokens are not special.
SPECIAL_LISTS = {"additional_special_tokens", "extra_special_tokens"}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, exactly as `tokenizer.json` defines it.

    AutoTokenizer of transformers 5 may follow `tokenizer_class: LlamaTokenizerFast` instead, as in R1's config.

    Raises:
        FileNotFoundError: the folder has no `tokenizer.json`.
    """
    folder = require_path(Path(folder) / TOKENIZER, "tokenizer").parent
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def patch_tokenizer(
    source: str | Path,
    destination: str | Path,
    replacements: dict[str, str],
    trailing_newline: bool = False,
    template: str | Path = "",
    overwrite: bool = False,
    dialect: str = THINKLESS.name,
) -> dict:
    """Copy a tokenizer to a new folder with tokens renamed and the chat template prepared for training.

    A token that already has its new name is kept and reported: patching a patched tokenizer changes nothing.

    Args:
        replacements: old token -> new token, such as {'<|quad_start|>': '<short>'}. Ids do not change. The new tokens
            are not special, so they survive `skip_special_tokens`.
        trailing_newline: see `templates.patch_template`.
        template: a file with a chat template to use unchanged in place of the edited one.
        overwrite: also replace a `destination` made from another tokenizer or template.
        dialect: which control tokens must exist, so whether `replacements` may be empty (`tokenizer.dialect`). That of
            Qwen3 also has an edited template write the empty think block for `enable_thinking=False`.

    Returns:
        The manifest: `ids` of all control tokens, `vocab_size`, `edits` of the template with their reasons,
        `template_diff`, and the hashes of the inputs.

    Raises:
        FileNotFoundError: `source` has no tokenizer.
        FileExistsError: `destination` is something else, or was made from another tokenizer or template.
        ValueError: a token to replace does not exist or is in use, a new token already exists, the template cannot
            be edited, or a file that cannot be edited contains a token to replace.
    """
    forms = dialect_of({"dialect": dialect})
    if not replacements and SHORT in forms.tags:
        raise ValueError("replacements is empty; expected at least one, such as {'<|quad_start|>': '<short>'}")
    source = require_path(Path(source) / TOKENIZER, "tokenizer of the model").parent
    before = load_tokenizer(source)
    raw = Tokenizer.from_file(str(source / TOKENIZER))
    expected = _expected_ids(source, replacements, raw, before.special_tokens_map)
    own = require_path(template, "template").read_text(encoding="utf-8") if str(template) else ""
    stock = _template(before, source, own)
    patched, edits = (own, []) if own else patch_template(stock.removesuffix(forms.hard_switch), trailing_newline)
    patched += "" if own else forms.hard_switch
    for old, new in replacements.items():
        patched = patched.replace(old, new)
    facts = {
        "made_by": "patch_tokenizer",
        "source": str(source),
        "source_sha256": _source_hash(source, stock),
        "source_template_sha256": text_hash(stock),
        "template": str(resolve(template)) if own else "",
        "template_sha256": text_hash(patched),
        "replacements": replacements,
        "edits": {edit.name: edit.why for edit in edits},
        "template_diff": template_diff(stock, patched),
        "vocab_size": raw.get_vocab_size(),
    }
    with new_folder(resolve(destination), facts, source=["source", "template"], overwrite=overwrite) as folder:
        for name in FILES:
            if (source / name).is_file():
                _copy(source / name, folder / name, replacements)
        _write_template(folder, patched)
        facts["ids"] = _check_patched(folder, expected, facts["vocab_size"], forms.tags)
    return facts


def _source_hash(source: Path, template: str) -> str:
    """SHA-256 that identifies a model's tokenizer; models that share `tokenizer.json` differ in the other inputs."""
    files = (source / name for name in (TOKENIZER, "config.json"))
    return text_hash("".join([*(file_hash(file) for file in files if file.is_file()), text_hash(template)]))


def fingerprint(folder: Path, tokenizer=None) -> dict[str, str]:
    """SHA-256 of a folder's `tokenizer.json` and chat template, which data, training and export must share.

    Args:
        tokenizer: the result of `load_tokenizer(folder)`, if already loaded.
    """
    template = (tokenizer or load_tokenizer(folder)).chat_template or ""
    return {"tokenizer_sha256": file_hash(folder / TOKENIZER), "template_sha256": text_hash(template)}


def text_hash(text: str) -> str:
    """SHA-256 of a string in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def disagreements(folder: Path, tokenizer) -> list[str]:
    """Messages about tokens for which a file beside `tokenizer.json` and the loaded tokenizer differ."""
    added = folder / "added_tokens.json"
    decoder = _read(folder / CONFIG).get("added_tokens_decoder", {})
    entries = [(CONFIG, int(number), token["content"]) for number, token in decoder.items()]
    entries += [(added.name, number, token) for token, number in (_read(added) if added.is_file() else {}).items()]
    return [
        f"{name} calls token {number} {token!r}, {TOKENIZER} calls it {tokenizer.convert_ids_to_tokens(number)!r}"
        for name, number, token in entries
        if tokenizer.convert_tokens_to_ids(token) != number
    ]


def _expected_ids(source: Path, replacements: dict[str, str], raw: Tokenizer, special: dict) -> dict[str, int]:
    """The id of each new token after patching; `special` maps roles such as `bos_token` to their tokens."""
    ids = {token.content: number for number, token in raw.get_added_tokens_decoder().items()}
    roles = {token: role for role, token in special.items() if isinstance(token, str)}
    if len(set(replacements.values())) < len(replacements):
        raise ValueError(f"two tokens cannot be renamed to the same one: {replacements}")
    for old, new in replacements.items():
        if new in ids and old in ids:
            raise ValueError(
                f"{source}: cannot rename {old!r} (id {ids[old]}): {new!r} is already a token (id {ids[new]})"
            )
        if old in roles:
            raise ValueError(f"{source}: {old!r} is the tokenizer's {roles[old]}; choose an unused token")
        if new not in ids and old not in ids:
            known = visible(", ".join(sorted(ids)))
            raise ValueError(f"{source}: no added token {old!r} to replace; the added tokens are {known}")
        if new in ids:
            print(f"{source}: {new!r} already exists (id {ids[new]}) and {old!r} does not; nothing to rename")
    return {new: ids[old] if old in ids else ids[new] for old, new in replacements.items()}


def _template(tokenizer, source: Path, own: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        raise ValueError(
            f"{source} has several chat templates ({', '.join(template)}); training and serving must use the same one: "
            "copy the folder with only one of them"
        )
    if not template and not own:
        raise ValueError(f"{source}: the tokenizer has no chat template; set `template` to a file with one")
    return template or ""


def _copy(path: Path, target: Path, replacements: dict[str, str]) -> None:
    """Copy a file with tokens renamed; byte for byte if it contains none of them."""
    if path.suffix == ".json":
        content = _read(path)
        renamed = _renamed(content, replacements)
        if path.name == CONFIG and _is_llama(content, path.parent):
            renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
        if renamed != content:
            _write(target, path, renamed)
            return
    if path.suffix == ".model" and any(old.encode() in path.read_bytes() for old in replacements):
        raise ValueError(
            f"{path} has one of {list(replacements)} in a sentencepiece vocabulary, which cannot be edited; choose "
            "another token, or copy the folder without this file: tokenizer.json contains the same vocabulary"
        )
    shutil.copyfile(path, target)


def _is_llama(config: dict, folder: Path) -> bool:
    """Whether `tokenizer_class` names Llama's tokenizer although `tokenizer.json` is byte-level.

    LlamaTokenizer of transformers 5 pre-tokenizes like sentencepiece, so R1's tokenizer would lose its spaces.
    https://github.com/huggingface/transformers/issues/45488
    """
    named = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    return named and "ByteLevel" in json.dumps(_read(folder / TOKENIZER)["pre_tokenizer"])


def _renamed(node, replacements: dict[str, str], key: str = ""):
    """`node` with tokens renamed where one is a complete key or value, and with their special flags cleared.

    `merges` are skipped: added tokens are not built from merges.
    """
    if isinstance(node, str):
        return replacements.get(node, node)
    if key == "merges" or not isinstance(node, list | dict):
        return node
    if isinstance(node, list):
        kept = [item for item in node if key not in SPECIAL_LISTS or not _names(item, replacements)]
        return [_renamed(item, replacements) for item in kept]
    renamed = {replacements.get(k, k): _renamed(v, replacements, k) for k, v in node.items()}
    if "special" in node and renamed.get("content") in replacements.values():
        renamed |= {flag: False for flag in ("special", "lstrip", "rstrip", "single_word") if flag in node}
    return renamed


def _names(item, replacements: dict[str, str]) -> bool:
    token = item.get("content") if isinstance(item, dict) else item
    return token in [*replacements, *replacements.values()]


def _write_template(folder: Path, template: str) -> None:
    """Write the template where the folder keeps it: in the config, or in its own file (transformers 4.54 and later)."""
    config = _read(folder / CONFIG)
    if "chat_template" in config:
        _write(folder / CONFIG, folder / CONFIG, config | {"chat_template": template})
    if "chat_template" not in config or (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _check_patched(folder: Path, expected: dict[str, int], size: int, tags: list[str]) -> dict[str, int]:
    """Reload the folder, check that every control token is a single token with its expected id, and return the ids."""
    after = load_tokenizer(folder)
    if differing := disagreements(folder, after):
        raise ValueError(f"{differing[0]}; add `wrong token -> right token` to the replacements")
    if len(after) != size:
        new = sorted(token for token, number in after.get_vocab().items() if number >= size)
        raise ValueError(
            f"{CONFIG} or another file names {', '.join(map(repr, new))}, which {TOKENIZER} does not have: remove it "
            "there, or replace it by a token of the vocabulary"
        )
    encoded = {t: after(t, add_special_tokens=False)["input_ids"] for t in [*tags, *expected]}
    for token, ids in encoded.items():
        if len(ids) != 1:
            raise ValueError(
                f"{token!r} should be one token but has ids {ids}: rename an unused token, by adding "
                f"`unused token -> {token}` to the replacements"
            )
        if ids[0] != expected.get(token, ids[0]):
            raise ValueError(f"{folder}: {token!r} has id {ids[0]}, expected {expected[token]}")
    return {token: ids[0] for token, ids in encoded.items()}


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, source: Path, content: dict) -> None:
    """Write JSON as transformers and tokenizers do, so that a file differs from `source` only in its edits."""
    end = "\n" if source.read_text(encoding="utf-8").endswith("\n") else ""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + end, encoding="utf-8")
