"""Tokenizer surgery: unused tokens become control tokens, in every file that names them."""

import hashlib
import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rsft_lib.common.artifact import file_hash, new_folder
from rsft_lib.common.paths import existing, resolve
from rsft_lib.common.visible import visible
from rsft_lib.tokenizer.chat import END_THINK, MODES
from rsft_lib.tokenizer.templates import patch_template, template_diff

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

# config.json tells AutoTokenizer which model this is for, generation_config.json names the token that ends answers.
FILES = [
    TOKENIZER, CONFIG, TEMPLATE, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json", "generation_config.json",
]  # fmt: skip

# Where tokenizer files list the tokens that are special beside BOS, EOS and padding; a control token is none.
SPECIAL_LISTS = {"additional_special_tokens", "extra_special_tokens"}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, exactly as its `tokenizer.json` says.

    AutoTokenizer of transformers 5 may build R1's from `tokenizer_class: LlamaTokenizerFast` instead.

    Raises:
        FileNotFoundError: the folder has no `tokenizer.json`.
    """
    folder = existing(Path(folder) / TOKENIZER, "tokenizer").parent
    return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)


def patch_tokenizer(
    source: str | Path,
    destination: str | Path,
    replacements: dict[str, str],
    trailing_newline: bool = False,
    template: str | Path = "",
    overwrite: bool = False,
) -> dict:
    """Copy a tokenizer to a new folder with tokens renamed and the chat template made ready for training.

    A token that has its new name already is left as it is, and said so: patching twice gives the same files.

    Args:
        replacements: old token -> new token, such as {'<|quad_start|>': '<short>'}. Ids stay as they are, and
            the new tokens are no special ones, so they survive `skip_special_tokens`.
        trailing_newline: see `templates.patch_template`.
        template: a file with a chat template of your own, taken as it is in place of the edited one.
        overwrite: replace `destination` where it was made from another tokenizer or template, too.

    Returns:
        The manifest's facts: `ids` of every control token, `vocab_size`, `edits` of the template with the reason
        of each, `template_diff`, and the hashes of what was read.

    Raises:
        FileNotFoundError: there is no tokenizer.
        FileExistsError: `destination` is something else, or was made from another tokenizer or template.
        ValueError: a token to replace is not there or in use, a new one is another token already, the template
            cannot be edited, or a file of another kind names a token.
    """
    if not replacements:
        raise ValueError("replacements are empty; expected at least one, such as {'<|quad_start|>': '<short>'}")
    source = existing(Path(source) / TOKENIZER, "tokenizer of the model").parent
    before = load_tokenizer(source)
    raw = Tokenizer.from_file(str(source / TOKENIZER))
    expected = _expected_ids(source, replacements, raw, before.special_tokens_map)
    own = existing(template, "template").read_text(encoding="utf-8") if str(template) else ""
    stock = _template(before, source, own)
    patched, edits = (own, []) if own else patch_template(stock, trailing_newline)
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
        facts["ids"] = _check_patched(folder, expected, facts["vocab_size"])
    return facts


def _source_hash(source: Path, template: str) -> str:
    """SHA-256 that tells a model's tokenizer from that of another one, which may share `tokenizer.json` with it."""
    files = (source / name for name in (TOKENIZER, "config.json"))
    return text_hash("".join([*(file_hash(file) for file in files if file.is_file()), text_hash(template)]))


def fingerprint(folder: Path, tokenizer=None) -> dict[str, str]:
    """SHA-256 of a folder's `tokenizer.json` and of its chat template: what data, training and export must share.

    Args:
        tokenizer: as `load_tokenizer` reads it from the folder, where the caller has done so.
    """
    template = (tokenizer or load_tokenizer(folder)).chat_template or ""
    return {"tokenizer_sha256": file_hash(folder / TOKENIZER), "template_sha256": text_hash(template)}


def text_hash(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def disagreements(folder: Path, tokenizer) -> list[str]:
    """Tokens that a file beside `tokenizer.json` calls otherwise than the loaded tokenizer does, in words."""
    added = folder / "added_tokens.json"
    decoder = _read(folder / CONFIG).get("added_tokens_decoder", {})
    stated = [(CONFIG, int(number), token["content"]) for number, token in decoder.items()]
    stated += [(added.name, number, token) for token, number in (_read(added) if added.is_file() else {}).items()]
    return [
        f"{name} calls token {number} {token!r}, {TOKENIZER} calls it {tokenizer.convert_ids_to_tokens(number)!r}"
        for name, number, token in stated
        if tokenizer.convert_tokens_to_ids(token) != number
    ]


def _expected_ids(source: Path, replacements: dict[str, str], raw: Tokenizer, special: dict) -> dict[str, int]:
    """The id that each new token gets, or has already; `special` maps roles such as `bos_token` to their tokens."""
    ids = {token.content: number for number, token in raw.get_added_tokens_decoder().items()}
    roles = {token: role for role, token in special.items() if isinstance(token, str)}
    if len(set(replacements.values())) < len(replacements):
        raise ValueError(f"two tokens cannot become the same one: {replacements}")
    for old, new in replacements.items():
        if new in ids and old in ids:
            raise ValueError(f"{source}: {new!r} is a token already (id {ids[new]}), beside {old!r} (id {ids[old]})")
        if old in roles:
            raise ValueError(f"{source}: {old!r} is the tokenizer's {roles[old]}; choose a token that is not used")
        if new not in ids and old not in ids:
            known = visible(", ".join(sorted(ids)))
            raise ValueError(f"{source}: no added token {old!r} to replace; there are {known}")
        if new in ids:
            print(f"{source}: {new!r} is there already (id {ids[new]}) and {old!r} is gone; nothing to rename")
    return {new: ids.get(old, ids.get(new)) for old, new in replacements.items()}


def _template(tokenizer, source: Path, own: str) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        raise ValueError(
            f"{source} has several chat templates ({', '.join(template)}); what is served must be what was trained: "
            "copy the folder with only one of them"
        )
    if not template and not own:
        raise ValueError(f"{source}: the tokenizer has no chat template; give a file with one as `template`")
    return template or ""


def _copy(path: Path, target: Path, replacements: dict[str, str]) -> None:
    """Copy a file with tokens renamed; where it names none, byte for byte."""
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
            f"{path} has one of {list(replacements)} in a vocabulary of sentencepiece, which cannot be renamed there; "
            "choose another token, or copy the folder without this file: tokenizer.json says all it says"
        )
    shutil.copyfile(path, target)


def _is_llama(config: dict, folder: Path) -> bool:
    """Whether AutoTokenizer is told to build Llama's tokenizer from a byte-level one.

    LlamaTokenizer of transformers 5 cuts text as sentencepiece does, so R1's would lose its spaces.
    https://github.com/huggingface/transformers/issues/45488
    """
    named = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    return named and "ByteLevel" in json.dumps(_read(folder / TOKENIZER)["pre_tokenizer"])


def _renamed(node, replacements: dict[str, str], key: str = ""):
    """`node` with tokens renamed wherever one is a whole string, key or value, and no longer special.

    `merges` are left out, since no added token is made of others.
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
    """Write the template wherever the folder keeps one: in the config, or in a file of its own (from 4.54 on)."""
    config = _read(folder / CONFIG)
    if "chat_template" in config:
        _write(folder / CONFIG, folder / CONFIG, config | {"chat_template": template})
    if "chat_template" not in config or (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def _check_patched(folder: Path, expected: dict[str, int], size: int) -> dict[str, int]:
    """Load the folder afresh and return the ids of all control tokens; each is one, and no id has moved."""
    after = load_tokenizer(folder)
    if differing := disagreements(folder, after):
        raise ValueError(f"{differing[0]}; add the one to the replacements, as `old -> new`, to settle it")
    if len(after) != size:
        new = sorted(token for token, number in after.get_vocab().items() if number >= size)
        raise ValueError(
            f"{CONFIG} or another file names {', '.join(map(repr, new))}, which {TOKENIZER} does not have: remove it "
            "there, or put a token of the vocabulary in its place"
        )
    found = {t: after(t, add_special_tokens=False)["input_ids"] for t in [*MODES.values(), END_THINK, *expected]}
    for token, ids in found.items():
        if len(ids) != 1:
            raise ValueError(
                f"{token!r} should be one token but is {ids}: let an unused one become it, by adding "
                f"`unused token -> {token}` to the replacements"
            )
        if ids[0] != expected.get(token, ids[0]):
            raise ValueError(f"{folder}: {token!r} should have id {expected[token]} and has {ids[0]}")
    return {token: ids[0] for token, ids in found.items()}


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, source: Path, content: dict) -> None:
    """As transformers and tokenizers write JSON, so that a file differs from its source where it was edited only."""
    end = "\n" if source.read_text(encoding="utf-8").endswith("\n") else ""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + end, encoding="utf-8")
