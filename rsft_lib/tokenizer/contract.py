"""The contract between training and serving: a table of named checks on a tokenizer folder, freshly loaded."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rsft_lib.common.artifact import file_hash, read_manifest
from rsft_lib.common.check_table import Checks, Skip
from rsft_lib.common.paths import existing
from rsft_lib.tokenizer.chat import END_THINK, MODES
from rsft_lib.tokenizer.patch import FILES, disagreements, load_tokenizer
from rsft_lib.tokenizer.template_checks import CHAT, check_template

# Where tokenizers differ: spaces, line ends, digits, contractions, scripts, characters of several code points.
TEXTS = [
    " two  spaces\tand\ttabs \r\n\n\n end ", "12345 3.14 1e-9 0x1F", "they're I'LL don't", "x_1 = f(a[0]);  // why?",
    "数学，并且。 한국어 العربية हिन्दी", "🙂👩‍👩‍👧 e\u0301 é ﬁ \u200b\ufeff", "\\boxed{4}\n```py\n",
    "<sho rt> <think >\n</ think> <|quad",
]  # fmt: skip
BATCH = 1000  # lines of a corpus that are compared at once


def check_contract(folder: str | Path, corpus: str | Path = "") -> Checks:
    """Every check of a tokenizer folder, those too that need another tokenizer beside it.

    Args:
        corpus: a text file, such as JSON Lines; each of its lines, beside a few hard ones, must be the same tokens
            as in the source. Lines that name a replaced token are left out.

    Raises:
        FileNotFoundError: there is no such folder, tokenizer or corpus.
    """
    folder = existing(folder, "tokenizer folder")
    lines = existing(corpus, "corpus") if str(corpus) else None
    tokenizer, manifest = load_tokenizer(folder), _manifest(folder)
    checks = _own_checks(folder, tokenizer, manifest)
    checks.run("other text as before", _other_text, tokenizer, manifest, lines)
    checks.run("served alike", _served_alike, folder, tokenizer)
    return Checks([*checks, *check_template(folder, tokenizer)])


def require_contract(folder: str | Path, tokenizer=None) -> None:
    """Run the checks that the folder can answer alone; it takes about a second.

    Args:
        tokenizer: as `load_tokenizer` reads it from the folder, where the caller has done so.

    Raises:
        FileNotFoundError: there is no such folder, or no tokenizer in it.
        ValueError: a check fails; each that does is named, with what was found.
    """
    folder = existing(folder, "tokenizer folder")
    tokenizer = tokenizer or load_tokenizer(folder)
    Checks([*_own_checks(folder, tokenizer, _manifest(folder)), *check_template(folder, tokenizer)]).require(folder)


def _own_checks(folder: Path, tokenizer, manifest: dict) -> Checks:
    control = [*MODES.values(), END_THINK]
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
        raise Skip("the folder was not written by patch_tokenizer, so what it was before is not known")
    return manifest


def _files_are_whole(folder: Path, manifest: dict) -> str:
    if not manifest:
        raise ValueError(
            "there is no manifest; patch the tokenizer (notebook 01): one that was patched by hand is taken as it is"
        )
    names = [name for name in FILES if (folder / name).is_file()]
    listed = {name: manifest["files"][name]["sha256"] for name in FILES if name in manifest["files"]}
    changed = sorted({name for name in names if file_hash(folder / name) != listed.get(name)} | listed.keys() - names)
    if changed:
        raise ValueError(f"{', '.join(changed)} changed since the folder was written")
    return f"{len(names)} files with the hashes of the manifest"


def _files_agree(folder: Path, tokenizer) -> str:
    if found := disagreements(folder, tokenizer):
        raise ValueError("; ".join(found))
    return "every file gives a token the same id"


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
    return ", ".join(f"{new} has {found[new]} from {old}" for old, new in replacements.items())


def _vocabulary_kept(tokenizer, manifest: dict) -> str:
    size = _patch_facts(manifest)["vocab_size"]
    if len(tokenizer) != size:
        raise ValueError(f"{len(tokenizer):,} tokens, the source has {size:,}")
    return f"{size:,} tokens, as before"


def _are_read(tokenizer, control: list[str]) -> str:
    text = "a".join(control)
    found = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    if found != text:
        raise ValueError(f"skip_special_tokens makes {found!r} of {text!r}: servers would not return the token")
    return "they survive skip_special_tokens, with which servers decode"


def _round_trip(tokenizer, control: list[str]) -> str:
    for token in control:
        for text in (f"a{token}b", f" {token} ", f"a \n{token}\n\nb", token * 2):
            found = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
            if found != text:
                raise ValueError(f"{text!r} comes back as {found!r}")
    return "text around them, spaces and line ends too, comes back as it was"


def _generation_stops(folder: Path, tokenizer) -> str:
    path = folder / "generation_config.json"
    stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    if stops is None:
        raise Skip("no generation_config.json says where")
    if tokenizer.eos_token_id not in (stops if isinstance(stops, list) else [stops]):
        raise ValueError(
            f"generation_config.json stops at {stops}, answers are trained to end with {tokenizer.eos_token_id} "
            f"({tokenizer.eos_token})"
        )
    return f"at {tokenizer.eos_token} ({tokenizer.eos_token_id}), with which answers end"


def _other_text(tokenizer, manifest: dict, corpus: Path | None) -> str:
    source, replaced = Path(_patch_facts(manifest)["source"]), manifest["replacements"]
    if not source.is_dir():
        raise Skip(f"the source {source} is gone")
    before, names, count, left_out = load_tokenizer(source), [*replaced, *replaced.values()], 0, 0
    for batch in _batches(corpus):
        texts = [text for text in batch if not any(name in text for name in names)]
        count, left_out = count + len(texts), left_out + len(batch) - len(texts)
        pairs = zip(texts, before(texts)["input_ids"], tokenizer(texts)["input_ids"], strict=True)
        for text, expected, found in pairs:
            if expected != found:
                raise ValueError(f"{text[:80]!r} is {found[:20]}, in the source {expected[:20]}")
    return f"{count:,} texts are the same tokens" + f"; {left_out:,} that name a replaced token left out" * bool(
        left_out
    )


def _batches(corpus: Path | None) -> Iterator[list[str]]:
    yield TEXTS
    if corpus:
        with corpus.open(encoding="utf-8", errors="replace") as lines:
            while batch := list(islice(lines, BATCH)):
                yield batch


def _served_alike(folder: Path, tokenizer) -> str:
    """AutoTokenizer, which servers use, may build another tokenizer from the class or model that the files name."""
    from transformers import AutoTokenizer  # takes seconds, and most callers need none

    served = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if served.chat_template != tokenizer.chat_template:
        raise ValueError(f"{type(served).__name__} has another chat template")
    marks = "".join(f"{token}\n" for token in tokenizer.get_added_vocab())
    for text in [*TEXTS, marks, *(message["content"] for message in CHAT)]:
        expected, found = (t(text)["input_ids"] for t in (tokenizer, served))
        if found != expected or served.decode(found) != tokenizer.decode(expected):
            raise ValueError(
                f"AutoTokenizer makes a {type(served).__name__} that reads {text[:40]!r} as {found[:12]}, "
                f"tokenizer.json says {expected[:12]}"
            )
    if served.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(f"AutoTokenizer ends with {served.eos_token_id}, training with {tokenizer.eos_token_id}")
    return f"AutoTokenizer makes a {type(served).__name__} that agrees"
