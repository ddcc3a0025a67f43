"""Tokenizer patching: give a model its control tokens and a training template, in every tokenizer file."""

import hashlib
from collections.abc import Collection
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from rsft_lib.common.artifact import file_hash, new_folder
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.common.visible import visible
from rsft_lib.tokenizer.chat import ChatTemplate
from rsft_lib.tokenizer.dialect import SHORT, THINKLESS, Dialect, dialect_of
from rsft_lib.tokenizer.fitting import training_template
from rsft_lib.tokenizer.template_changes import changes
from rsft_lib.tokenizer.token_files import (
    ADDED,
    CONFIG,
    FILES,
    SPECIAL_MAP,
    TOKENIZER,
    Edits,
    read,
    write_template,
)

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, exactly as `tokenizer.json` defines it.

    AutoTokenizer of transformers 5 may follow `tokenizer_class: LlamaTokenizerFast` instead, as in R1's config.

    Raises:
        FileNotFoundError: the folder has no `tokenizer.json`.
    """
    return PreTrainedTokenizerFast.from_pretrained(require_tokenizer(folder), trust_remote_code=False)


def require_tokenizer(folder: str | Path, what: str = "tokenizer") -> Path:
    """The folder, with its path resolved; `what` describes the tokenizer in the error.

    Raises:
        FileNotFoundError: the folder has no `tokenizer.json`.
    """
    place = resolve(folder)
    if not (place / TOKENIZER).is_file() and any((place / name).is_file() for name in SENTENCEPIECE):
        raise FileNotFoundError(
            f"{place} has a SentencePiece vocabulary but no {TOKENIZER}, which this kit needs; write one with "
            f"transformers and sentencepiece installed: AutoTokenizer.from_pretrained({str(place)!r})"
            f".save_pretrained({str(place)!r})"
        )
    return require_path(place / TOKENIZER, what).parent


def patch_tokenizer(
    source: str | Path,
    destination: str | Path,
    replacements: dict[str, str],
    trailing_newline: bool = False,
    template: str | Path = "",
    overwrite: bool = False,
    *,
    new_tokens: Collection[str] = (),
    eos: str = "",
    dialect: str = THINKLESS.name,
) -> dict:
    """Copy a tokenizer to a new folder with its control tokens and a chat template for training.

    A token that already has its new name is kept and reported: patching a patched tokenizer changes nothing. The
    special flags of control tokens are cleared, so that they survive `skip_special_tokens`.

    Args:
        replacements: old token -> new token, such as {'<|quad_start|>': '<short>'}. Ids do not change.
        trailing_newline: see `fitting.training_template`.
        template: a file with a chat template to use unchanged in place of the format's training template.
        overwrite: also replace a `destination` made from another tokenizer or template.
        new_tokens: tokens to add after the last one, for a vocabulary without unused tokens. They use spare rows of the
            embedding if it has any; otherwise notebook 02 adds rows.
        eos: the token that ends an answer; empty for the format's, or for the tokenizer's if `template` is given. It
            becomes EOS in the tokenizer files, `generation_config.json` and `config.json`.
        dialect: which control tokens must exist, so whether both may be empty (`tokenizer.dialect`). That of Qwen3 also
            has the training template write the empty think block for `enable_thinking=False`.

    Returns:
        The manifest: `ids` of all control tokens, `vocab_size`, `changes`: what changes and why, `template_diff`: the
        difference of rendered sample chats, and the hashes of the inputs.

    Raises:
        FileNotFoundError: `source` has no tokenizer.
        FileExistsError: `destination` is something else, or was made from another tokenizer or template.
        ValueError: a token to replace does not exist or is in use, a new token already exists, the chat format is
            unknown, or a file that cannot be edited contains a token to replace.
    """
    forms = dialect_of({"dialect": dialect})
    if not replacements and not new_tokens and SHORT in forms.tags:
        raise ValueError("no tokens are given: set replacements, such as {'<|quad_start|>': '<short>'}, or new_tokens")
    source = require_tokenizer(source, "tokenizer of the model")
    before = load_tokenizer(source)
    raw = Tokenizer.from_file(str(source / TOKENIZER))
    expected = _expected_ids(source, replacements, raw, before.special_tokens_map)
    new = _new_ids(source, new_tokens, raw)
    own = require_path(template, "template").read_text(encoding="utf-8") if str(template) else ""
    stock = _template(before, source, own)
    patched, why, difference, end = _patched_template(before, stock, own, trailing_newline, forms)
    for old, name in replacements.items():
        patched = patched.replace(old, name)
    plain = frozenset({*forms.tags, *replacements.values(), *new})
    edits = Edits(replacements, new, plain, _eos(before, new, eos, end))
    facts = {
        "made_by": "patch_tokenizer",
        "source": str(source),
        "source_sha256": _source_hash(source, stock),
        "source_template_sha256": text_hash(stock),
        "template": str(resolve(template)) if own else "",
        "template_sha256": text_hash(patched),
        "replacements": replacements,
        "new_tokens": list(new),
        "changes": why | _token_changes(source, before, edits),
        "template_diff": difference,
        "vocab_size": raw.get_vocab_size() + len(new),
    }
    with new_folder(resolve(destination), facts, source=["source", "template"], overwrite=overwrite) as folder:
        for name in FILES:
            if (source / name).is_file():
                edits.copy(source / name, folder / name)
        write_template(folder, patched)
        facts["ids"] = _check_patched(folder, expected | new, facts["vocab_size"], forms.tags)
    return facts


def _patched_template(
    tokenizer, stock: str, own: str, trailing_newline: bool, dialect: Dialect
) -> tuple[str, dict[str, str], str, str]:
    """The chat template to write, why it changes texts, the difference of sample chats, the token that ends answers."""
    if own:
        return own, {"chat template": "the one that was given"}, "", ""
    stock = stock.removesuffix(dialect.hard_switch)  # of a folder that was patched before
    fitted, texts = training_template(ChatTemplate(stock, tokenizer.special_tokens_map), trailing_newline)
    return fitted.source + dialect.hard_switch, *changes(fitted, texts), fitted.settings["end"]


def _eos(tokenizer, new: dict[str, int], wanted: str, end: str) -> tuple[str, int] | None:
    """The token that ends answers and its id; `wanted` by the caller, `end` of the format."""
    if wanted and end and wanted != end:
        raise ValueError(f"eos is {wanted!r}, but the training template ends answers with {end!r}; leave eos empty")
    token = wanted or end
    if not token:
        return None
    number = tokenizer.get_vocab().get(token, new.get(token))
    if number is None:
        raise ValueError(f"answers end with {token!r}, which is not a token of the vocabulary; add it to new_tokens")
    return token, number


def _token_changes(source: Path, before: PreTrainedTokenizerFast, edits: Edits) -> dict[str, str]:
    """What the edits change beside the template, for the table in notebook 01."""
    found = {}
    if edits.eos and before.eos_token != edits.eos[0]:
        found["EOS"] = f"{edits.eos[0]}, with which the template ends answers, in place of {before.eos_token}"
    special = {token.content for token in before.added_tokens_decoder.values() if token.special}
    if flagged := sorted(special & edits.plain):
        found["special flag"] = f"cleared for {', '.join(flagged)}: servers drop special tokens from their output"
    path = source / "config.json"
    rows = read(path).get("vocab_size", 0) if path.is_file() else 0
    for token, number in edits.new.items():
        place = "a spare row of the embedding" if number < rows else "a new row of the embedding, added by notebook 02"
        found[token] = f"new token {number}, in {place}"
    return found


def _new_ids(source: Path, tokens: Collection[str], raw: Tokenizer) -> dict[str, int]:
    """The ids of new tokens: after the last one. Tokens that exist are reported and left out."""
    vocab = raw.get_vocab()
    if existing := [token for token in tokens if token in vocab]:
        print(f"{source}: {', '.join(map(repr, existing))} already exist; nothing to add")
    if unusable := [token for token in tokens if not token.strip() or token != token.strip()]:
        raise ValueError(f"new_tokens has {unusable}: a token must not be empty or begin or end with white space")
    missing = dict.fromkeys(token for token in tokens if token not in vocab)
    first = max(vocab.values()) + 1
    return {token: first + place for place, token in enumerate(missing)}


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
    added = folder / ADDED
    decoder = read(folder / CONFIG).get("added_tokens_decoder", {})
    entries = [(CONFIG, int(number), token["content"]) for number, token in decoder.items()]
    entries += [(ADDED, number, token) for token, number in (read(added) if added.is_file() else {}).items()]
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
            raise ValueError(
                f"{source}: no added token {old!r} to replace; the added tokens are {known}. Rename another unused "
                "one, or add the new one with new_tokens"
            )
        if new in ids:
            print(f"{source}: {new!r} already exists (id {ids[new]}) and {old!r} does not; nothing to rename")
    return {new: ids[old] if old in ids else ids[new] for old, new in replacements.items()}


def _template(tokenizer, source: Path, own: str) -> str:
    """The model's own chat template; of several, the one named `default`, which servers use."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        name = "default" if len(template) > 1 else next(iter(template))
        if name not in template and not own:
            raise ValueError(
                f"{source} has several chat templates ({', '.join(template)}), none named 'default'; training and "
                "serving must use the same one: set `template` to a file with it"
            )
        if others := [other for other in template if other != name]:
            print(f"{source}: the chat template {name!r} is used; {', '.join(others)} are left out")
        template = template.get(name)
    if not template and not own:
        raise ValueError(f"{source}: the tokenizer has no chat template; set `template` to a file with one")
    return template or ""


def _check_patched(folder: Path, expected: dict[str, int], size: int, tags: list[str]) -> dict[str, int]:
    """Reload the folder, check that every control token is a single token with its expected id, and return the ids."""
    after = load_tokenizer(folder)
    if differing := disagreements(folder, after):
        raise ValueError(f"{differing[0]}; add `wrong token -> right token` to the replacements")
    if len(after) != size:
        raise ValueError(
            f"{_phantoms(folder, after, size)}, which {TOKENIZER} does not have: remove it there, put a token of the "
            "vocabulary in its place, or add it with new_tokens"
        )
    encoded = {t: after(t, add_special_tokens=False)["input_ids"] for t in [*tags, *expected]}
    for token, ids in encoded.items():
        if len(ids) != 1:
            raise ValueError(
                f"{token!r} should be one token but has ids {ids}: rename an unused token, by adding "
                f"`unused token -> {token}` to the replacements, or add it to new_tokens"
            )
        if ids[0] != expected.get(token, ids[0]):
            raise ValueError(f"{folder}: {token!r} has id {ids[0]}, expected {expected[token]}")
    return {token: ids[0] for token, ids in encoded.items()}


def _phantoms(folder: Path, tokenizer, size: int) -> str:
    """Where files beside `tokenizer.json` name tokens that only they have, such as `pad_token is '<pad>'`."""
    unknown = {token for token, number in tokenizer.get_vocab().items() if number >= size}
    found = []
    for name in (CONFIG, SPECIAL_MAP):
        for key, value in (read(folder / name) if (folder / name).is_file() else {}).items():
            token = value.get("content") if isinstance(value, dict) else value
            found += [f"{name}: {key} is {token!r}"] if isinstance(token, str) and token in unknown else []
    return ", ".join(found) or f"a file beside {TOKENIZER} names {', '.join(map(repr, sorted(unknown)))}"
