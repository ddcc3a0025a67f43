"""The contract between training and serving: named checks that both see the same tokens, on a tokenizer folder."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rsft_lib.common.artifact import file_hash, read_manifest
from rsft_lib.common.check_table import Checks, Skip
from rsft_lib.common.paths import require_path
from rsft_lib.tokenizer.check_chats import CHAT
from rsft_lib.tokenizer.dialect import THINKLESS, Dialect
from rsft_lib.tokenizer.patch import disagreements, load_tokenizer
from rsft_lib.tokenizer.template_checks import check_template
from rsft_lib.tokenizer.token_files import FILES

# Texts on which tokenizers differ: spaces, line ends, digits, contractions, scripts, multi-code-point characters.
TEXTS = [
    " two  spaces\tand\ttabs \r\n\n\n end ", "12345 3.14 1e-9 0x1F", "they're I'LL don't", "x_1 = f(a[0]);  // why?",
    "数学，并且。 한국어 العربية हिन्दी", "🙂👩‍👩‍👧 e\u0301 é ﬁ \u200b\ufeff", "\\boxed{4}\n```py\n",
    "<sho rt> <think >\n</ think> <|quad",
]  # fmt: skip
BATCH = 1000  # corpus lines tokenized at a time


def check_contract(folder: str | Path, corpus: str | Path = "", dialect: Dialect = THINKLESS) -> Checks:
    """Run every check on a tokenizer folder, including those that load a second tokenizer for comparison.

    Args:
        corpus: a text file, such as JSON Lines; each line, in addition to `TEXTS`, must give the same tokens as with
            the source tokenizer. Lines that contain a replaced token are skipped.
        dialect: which control tokens are needed, and what else must survive the template.

    Raises:
        FileNotFoundError: the folder, its tokenizer or the corpus does not exist.
    """
    folder = require_path(folder, "tokenizer folder")
    lines = require_path(corpus, "corpus") if str(corpus) else None
    tokenizer, manifest = load_tokenizer(folder), _manifest(folder)
    checks = _own_checks(folder, tokenizer, manifest, dialect)
    checks.run("other text as before", _other_text, tokenizer, manifest, lines)
    checks.run("served alike", _served_alike, folder, tokenizer)
    return Checks([*checks, *check_template(folder, tokenizer, dialect)])


def require_contract(folder: str | Path, tokenizer=None, dialect: Dialect = THINKLESS) -> None:
    """Run the checks that need only the folder itself; takes about a second.

    Args:
        tokenizer: the result of `load_tokenizer(folder)`, if already loaded.
        dialect: as for `check_contract`.

    Raises:
        FileNotFoundError: the folder or its tokenizer does not exist.
        ValueError: checks fail; the message lists each with its detail.
    """
    folder = require_path(folder, "tokenizer folder")
    tokenizer = tokenizer or load_tokenizer(folder)
    own = _own_checks(folder, tokenizer, _manifest(folder), dialect)
    Checks([*own, *check_template(folder, tokenizer, dialect)]).require(str(folder))


def _own_checks(folder: Path, tokenizer, manifest: dict, dialect: Dialect) -> Checks:
    control = [*dialect.tags]
    control += [token for token in manifest.get("replacements", {}).values() if token not in control]
    checks = Checks()
    checks.run("files are whole", _files_are_whole, folder, manifest)
    checks.run("files agree", _files_agree, folder, tokenizer)
    checks.run("one token each", _one_token_each, tokenizer, control)
    checks.run("ids kept", _ids_kept, tokenizer, manifest)
    checks.run("vocabulary kept", _vocabulary_kept, tokenizer, manifest)
    checks.run("control tokens are read", _are_read, tokenizer, control)
    checks.run("control tokens round-trip", _round_trip, tokenizer, control)
    checks.run("generation stops", _generation_stops, folder, tokenizer)
    return checks


def _manifest(folder: Path) -> dict:
    try:
        return read_manifest(folder)
    except FileNotFoundError:
        return {}


def _patch_facts(manifest: dict) -> dict:
    if manifest.get("made_by") != "patch_tokenizer":
        raise Skip("the folder was not written by patch_tokenizer, so its source is unknown")
    return manifest


def _files_are_whole(folder: Path, manifest: dict) -> str:
    if not manifest:
        raise ValueError(
            "no manifest; run notebook 01_patch_tokenizer (a tokenizer that was patched by hand is copied unchanged)"
        )
    names = [name for name in FILES if (folder / name).is_file()]
    listed = {name: manifest["files"][name]["sha256"] for name in FILES if name in manifest["files"]}
    changed = sorted({name for name in names if file_hash(folder / name) != listed.get(name)} | listed.keys() - names)
    if changed:
        raise ValueError(f"{', '.join(changed)} changed since the folder was written")
    return f"{len(names)} files with the hashes of the manifest"


def _files_agree(folder: Path, tokenizer) -> str:
    if errors := disagreements(folder, tokenizer):
        raise ValueError("; ".join(errors))
    return "all files agree on the ids of the added tokens"


def _one_token_each(tokenizer, control: list[str]) -> str:
    ids = {token: tokenizer(token, add_special_tokens=False)["input_ids"] for token in control}
    if several := {token: found for token, found in ids.items() if len(found) != 1}:
        raise ValueError(f"expected one id each, found {several}")
    return ", ".join(f"{token} {found[0]}" for token, found in ids.items())


def _ids_kept(tokenizer, manifest: dict) -> str:
    expected, replacements = _patch_facts(manifest)["ids"], manifest["replacements"]
    found = {new: tokenizer.convert_tokens_to_ids(new) for new in replacements.values()}
    if moved := {new: number for new, number in found.items() if number != expected[new]}:
        raise ValueError(f"found {moved}, expected { ({new: expected[new] for new in moved}) }")
    if left := [old for old in replacements if old in tokenizer.get_added_vocab()]:
        raise ValueError(f"{left} are still tokens")
    return ", ".join(f"{new} has {found[new]} from {old}" for old, new in replacements.items()) or "none was renamed"


def _vocabulary_kept(tokenizer, manifest: dict) -> str:
    size = _patch_facts(manifest)["vocab_size"]
    if len(tokenizer) != size:
        raise ValueError(f"{len(tokenizer):,} tokens, the source has {size:,}")
    return f"{size:,} tokens, as in the source"


def _are_read(tokenizer, control: list[str]) -> str:
    text = "a".join(control)
    decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    if not _reads(tokenizer, decoded, text, control):
        raise ValueError(f"with skip_special_tokens, {text!r} is decoded as {decoded!r}: servers would drop the token")
    return "they survive decoding with skip_special_tokens, the default of servers"


def _round_trip(tokenizer, control: list[str]) -> str:
    for token in control:
        for text in (f"a{token}b", f" {token} ", f"a \n{token}\n\nb", token * 2):
            decoded = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
            if not _reads(tokenizer, decoded, text, control):
                raise ValueError(f"{text!r} is encoded and decoded as {decoded!r}")
    return "surrounding text, spaces and line ends are unchanged by encoding and decoding"


def _reads(tokenizer, decoded: str, text: str, control: list[str]) -> bool:
    """Whether a text is decoded as itself; SentencePiece writes a space after every added token, also after EOS."""
    eos = tokenizer.eos_token or ""
    if tokenizer.decode(tokenizer(f"a{eos}b", add_special_tokens=False)["input_ids"]) != f"a{eos} b":
        return decoded == text
    return text in (decoded, re.sub(f"({'|'.join(map(re.escape, control))}) ", r"\1", decoded))


def _generation_stops(folder: Path, tokenizer) -> str:
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    if stops is None:
        raise Skip("no eos_token_id in generation_config.json, or no such file")
    if tokenizer.eos_token_id not in (stops if isinstance(stops, list) else [stops]):
        raise ValueError(
            f"generation_config.json has eos_token_id {stops}, answers are trained to end with "
            f"{tokenizer.eos_token_id} ({tokenizer.eos_token})"
        )
    return f"at {tokenizer.eos_token} ({tokenizer.eos_token_id}), the token that ends trained answers"


def _other_text(tokenizer, manifest: dict, corpus: Path | None) -> str:
    source, replaced = Path(_patch_facts(manifest)["source"]), manifest["replacements"]
    if not source.is_dir():
        raise Skip(f"the source {source} no longer exists")
    before, names, count, skipped = load_tokenizer(source), [*replaced, *replaced.values()], 0, 0
    for batch in _batches(corpus):
        texts = [text for text in batch if not any(name in text for name in names)]
        count, skipped = count + len(texts), skipped + len(batch) - len(texts)
        pairs = zip(texts, before(texts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
        for text, expected, found in pairs:
            if expected != found:
                raise ValueError(f"{text[:80]!r} has ids {found[:20]}, with the source tokenizer {expected[:20]}")
    return f"{count:,} texts give the same tokens" + f"; {skipped:,} that contain a replaced token skipped" * bool(
        skipped
    )


def _batches(corpus: Path | None) -> Iterator[list[str]]:
    yield TEXTS
    if corpus:
        with corpus.open(encoding="utf-8", errors="replace") as lines:
            while batch := list(islice(lines, BATCH)):
                yield batch


def _served_alike(folder: Path, tokenizer) -> str:
    """Servers use AutoTokenizer, which may build a different tokenizer from the class or model type in the files."""
    from transformers import AutoTokenizer  # the import takes seconds, and most callers do not need it

    served = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if served.chat_template != tokenizer.chat_template:
        raise ValueError(f"AutoTokenizer builds a {type(served).__name__} with a different chat template")
    marks = "".join(f"{token}\n" for token in tokenizer.get_added_vocab())
    for text in [*TEXTS, marks, *(message["content"] for message in CHAT)]:
        expected, found = (t(text)["input_ids"] for t in (tokenizer, served))
        if found != expected or served.decode(found) != tokenizer.decode(expected):
            raise ValueError(
                f"AutoTokenizer builds a {type(served).__name__} that encodes {text[:40]!r} as {found[:12]}, "
                f"tokenizer.json as {expected[:12]}"
            )
    if served.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"AutoTokenizer has EOS id {served.eos_token_id}, training uses {tokenizer.eos_token_id}")
    return f"AutoTokenizer builds a {type(served).__name__} that agrees with tokenizer.json"
