"""Tokenizer surgery: an unused token becomes a control token, in every file that names it."""

import difflib
import json
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rsft_lib.artifact import new_folder
from rsft_lib.chat import END_THINK, MODES, patch_template
from rsft_lib.paths import existing, resolve

FILES = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "config.json", "generation_config.json",
]  # fmt: skip


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, exactly as its `tokenizer.json` says.

    AutoTokenizer of transformers 5 may build R1's from `tokenizer_class: LlamaTokenizerFast` instead.

    Raises:
        FileNotFoundError: the folder has no `tokenizer.json`.
    """
    return PreTrainedTokenizerFast.from_pretrained(existing(Path(folder) / "tokenizer.json", "tokenizer").parent)


def patch_tokenizer(source: str | Path, destination: str | Path, replacements: dict[str, str]) -> dict:
    """Copy a tokenizer to a new folder with tokens renamed and the chat template made ready for training.

    Args:
        replacements: old token -> new token, such as {'<|quad_start|>': '<short>'}. Ids stay as they are, and
            the new token is no special one, so it survives `skip_special_tokens`.

    Returns:
        The manifest's facts; `ids` maps every control token to its id, `template_diff` shows the edit.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: a token to replace is not there, a new one is already, or the template is unknown.
    """
    tokenizer = load_tokenizer(source)
    source = resolve(source)
    _check_tokens(tokenizer, replacements, source)
    facts = {"made_by": "patch_tokenizer", "source": str(source), "replacements": replacements}
    with new_folder(resolve(destination), facts) as folder:
        for name in FILES:
            if (source / name).is_file():
                _copy(source / name, folder / name, replacements)
        facts["template_diff"] = _write_template(folder, tokenizer.chat_template)
        facts["ids"] = _check_patched(folder, tokenizer, replacements)
    return facts


def _check_tokens(tokenizer, replacements: dict[str, str], source: Path) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(f"{source}: the tokenizer has no chat template")
    added = tokenizer.get_added_vocab()
    for old, new in replacements.items():
        if new in added:
            raise ValueError(f"{source}: {new!r} is a token already (id {added[new]}); is this folder patched?")
        if old not in added:
            raise ValueError(f"{source}: no added token {old!r} to replace; there are {', '.join(sorted(added))}")


def _copy(path: Path, target: Path, replacements: dict[str, str]) -> None:
    if path.suffix != ".json":
        shutil.copyfile(path, target)
        return
    content = _renamed(json.loads(path.read_text(encoding="utf-8")), replacements)
    target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renamed(node, replacements: dict[str, str]):
    """`node` with old tokens renamed wherever they stand as a whole string, key or value, and no longer special."""
    if isinstance(node, str):
        return replacements.get(node, node)
    if isinstance(node, list):
        # Lists of token names are lists of special ones; a renamed token is none.
        return [_renamed(item, replacements) for item in node if item not in list(replacements)]
    if isinstance(node, dict):
        renamed = {replacements.get(key, key): _renamed(value, replacements) for key, value in node.items()}
        if node.get("content") in replacements:
            renamed["special"] = False
        return renamed
    return node


def _write_template(folder: Path, template: str) -> str:
    """Write the patched template where the folder keeps it, and return the difference."""
    patched = patch_template(template)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if "chat_template" in config:
        config["chat_template"] = patched
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    else:
        (folder / "chat_template.jinja").write_text(patched, encoding="utf-8")
    before, after = (text.replace("{%", "\n{%").replace("{{", "\n{{").splitlines() for text in (template, patched))
    return "\n".join(difflib.unified_diff(before, after, "before", "after", lineterm="", n=1))


def _check_patched(folder: Path, before: PreTrainedTokenizerFast, replacements: dict[str, str]) -> dict[str, int]:
    """Load the folder afresh: every control token is one id, survives decoding, and no id has moved."""
    after = load_tokenizer(folder)
    if len(after) != len(before):
        raise ValueError(f"{folder}: {len(after)} tokens, the source has {len(before)}; it names a token elsewhere too")
    tokens = [*MODES.values(), END_THINK, *replacements.values()]
    ids = {token: after(token, add_special_tokens=False)["input_ids"] for token in tokens}
    moved = [old for old, new in replacements.items() if ids[new] != [before.convert_tokens_to_ids(old)]]
    for token, found in ids.items():
        if len(found) != 1 or after.decode(found, skip_special_tokens=True) != token or moved:
            raise ValueError(f"{folder}: {token!r} should be one ordinary token, but encodes to {found}; {moved=}")
    return {token: found[0] for token, found in ids.items()}
