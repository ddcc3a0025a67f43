"""A hybrid dataset: long answers that begin with <think> and short ones that begin with <short>, shuffled and split.

Two passes, so that a million long traces need little memory. The first reads, checks and measures the records and
lays them down in a scratch file; about 50 bytes of each stay in memory (`pairs.ROW`). The second copies those that
stay from there in their final order. The scratch file takes as much disk as the dataset and is gone at the end.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from rsft_lib.artifact import file_hash, new_folder, read_manifest, verify_files
from rsft_lib.chat import END_THINK, SHORT, THINK
from rsft_lib.data.answers import final_answer, normalized
from rsft_lib.data.pairs import balance, coverage, disagreeing, held_back, not_shorter
from rsft_lib.data.records import Source, as_text, conversation, parse, source_of
from rsft_lib.data.rejects import Reject, Rejects
from rsft_lib.data.scratch import Sample, Scratch
from rsft_lib.paths import existing, resolve
from rsft_lib.tokenizer import load_tokenizer

FINDINGS = "findings.jsonl"
TAGS = re.compile("|".join((THINK, END_THINK, SHORT)))


def build_hybrid(
    long: str | Path,
    short: str | Path,
    folder: str | Path,
    held_out: float,
    seed: int,
    *,
    cut_short: bool = False,
    tokenizer: str | Path = "",
    columns: dict[str, str] | None = None,
    empty_think: bool = False,
    on_disagreement: str = "drop",
    reject_limit: float = 0.001,
    overwrite: bool = False,
) -> dict:
    """Write `train.jsonl` and `heldout.jsonl` from a file of long answers and one of short answers.

    Where they are there already, made from the same, they are kept, and what was tokenized into their folder too.

    Either file may have problems that the other has not. The split is by problem, whatever its white space: all
    answers to it go to one side. `findings.jsonl` names the answers that disagree and the pairs whose short one is
    no shorter; `FOLDER.rejected.jsonl`, beside the folder, the records that cannot be used.

    Args:
        long: records whose answers are `<think>` thoughts `</think>` answer; a file, or a dataset on the Hub by name,
            `org/name` or `org/name:split@revision`.
        short: records whose answers are concise; `<short>` is put before them. Empty: they are cut from `long`,
            from after `</think>`.
        held_out: share of the problems that is kept from training; 0 for none, and then no `heldout.jsonl`.
        cut_short: cut short answers, too, to the problems that `short` does not have.
        tokenizer: folder of the tokenizer that measures lengths; empty measures characters.
        columns: what both call a field, e.g. {'prompt': 'question', 'response': 'answer'}.
        empty_think: accept `<think>` with nothing in it.
        on_disagreement: 'drop' or 'error', for answers to one problem whose final answers are not the same.
        reject_limit: largest share of the records that may be unusable.
        overwrite: replace `folder` where it was made from other answers, too.

    Returns:
        The manifest's facts. `counts` has the samples by split and mode, `balance` also the length of their prompts
        and answers in `unit`, `problems` how many are answered in which modes, `records` what became of those read.

    Raises:
        FileExistsError: `folder` is something else, or was made from other answers.
        ValueError: too many records are unusable, answers disagree where that is an error, or nothing is left.
    """
    if not 0 <= held_out < 1 or on_disagreement not in ("drop", "error"):
        raise ValueError(f"{held_out=} must be from 0 to below 1, and {on_disagreement=} 'drop' or 'error'")
    sources = [source_of(long, "long answers"), *([source_of(short, "short answers")] if short else [])]
    facts = {"made_by": "build_hybrid", "sources": {str(source): source.facts()["data_sha256"] for source in sources}}
    facts |= {
        "held_out": held_out, "seed": seed, "cut_short": cut_short, "columns": columns or {},
        "empty_think": empty_think, "on_disagreement": on_disagreement, "unit": "tokens" if tokenizer else "characters",
        "tokenizer_sha256": file_hash(existing(Path(tokenizer) / "tokenizer.json", "tokenizer")) if tokenizer else "",
    }  # fmt: skip
    destination = resolve(folder)
    if done := _already(destination, facts):
        return done
    with (
        new_folder(destination, facts, source=["sources"], overwrite=overwrite) as temporary,
        TemporaryFile(dir=temporary) as file,
        Rejects(destination, reject_limit) as rejects,
    ):
        scratch = Scratch(file, sources)
        read = partial(_usable, columns=columns, rejects=rejects)
        scratch.fill(_samples(sources, cut_short or not short, empty_think, read), _measure(tokenizer))
        rejects.settle(int((~_cut_rows(scratch.rows)).sum()) + rejects.count)
        kept, findings = _kept(scratch, on_disagreement)
        facts["records"] = _counts(scratch.rows, kept, rejects.count)
        facts["problems"] = coverage(scratch.rows[kept])
        facts["findings"] = dict(Counter(finding["finding"] for finding in findings))
        facts["balance"] = found = _write_splits(scratch, kept, held_out, seed, temporary)
        facts["counts"] = {s: {mode: n["samples"] for mode, n in modes.items()} for s, modes in found.items()}
        lines = (json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings)
        (temporary / FINDINGS).write_text("".join(lines), encoding="utf-8")
    return facts


def _already(destination: Path, facts: dict) -> dict | None:
    """The manifest of a whole dataset that was made from the same, if it is there. Tokens may lie in its folder."""
    try:
        found = read_manifest(destination)
        if None in facts["sources"].values() or any(found.get(name) != value for name, value in facts.items()):
            return None
        verify_files(destination, found["files"])
    except (OSError, ValueError):
        return None
    print(f"{destination} is there already, made from the same answers")
    return found


def _measure(tokenizer: str | Path) -> Callable[[list[str]], list[int]]:
    """What gives the lengths of texts: in tokens, or in characters where no tokenizer is named."""
    if not tokenizer:
        return lambda texts: [len(text) for text in texts]
    loaded = load_tokenizer(tokenizer)
    split = [tag for tag in (THINK, END_THINK, SHORT) if len(loaded.encode(tag, add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"{tokenizer}: {', '.join(split)} is not one token; patch it (notebook 01_patch_tokenizer)")
    backend = loaded.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _samples(sources: list[Source], cut: bool, empty_think: bool, read: Callable) -> Iterator[Sample]:
    """The samples of the short answers, then of the long ones, each with a short one cut from it where that is due."""
    long, answered = sources[0], set()
    for source in sources[1:]:
        for _, sample in read(source, _short):
            answered.add(sample.facts["problem"])
            yield sample
    for row, sample in read(long, partial(_long, empty_think=empty_think)):
        yield sample
        if cut and sample.facts["problem"] not in answered:
            yield _cut(sample, row)


def _usable(
    source: Source, make: Callable[..., Sample], columns: dict[str, str] | None, rejects: Rejects
) -> Iterator[tuple[int, Sample]]:
    """(number, sample) of every row of a source that makes one; the others are among the rejects."""
    for row in source.rows():
        try:
            record = parse(row.content)
            sample = make(row.number, record, *_pair(record, columns))
        except ValueError as error:
            rejects.add([Reject(str(source), row.number, str(error), as_text(row.content))], seen=row.number)
        else:
            yield row.number, sample


def _long(line: int, record: dict, prompt: str, answer: str, empty_think: bool) -> Sample:
    tags = TAGS.findall(answer)
    if tags != [THINK, END_THINK] or not answer.startswith(THINK):
        raise ValueError(
            f"a long answer must begin with {THINK}, close it with {END_THINK} once, and then answer; found "
            f"{' '.join(tags) or 'no tags'}, and {answer[:20]!r} at its beginning"
        )
    thoughts, _, rest = answer.removeprefix(THINK).partition(END_THINK)
    if not rest.strip():
        raise ValueError(f"a long answer must answer after {END_THINK}; nothing is there")
    if not thoughts.strip() and not empty_think:
        raise ValueError(f"{THINK} holds no thoughts; empty_think accepts that")
    return _sample(line, record, prompt, answer, long=True, from_long=True)


def _short(line: int, record: dict, prompt: str, answer: str) -> Sample:
    answer = answer.removeprefix(SHORT)
    if tags := TAGS.findall(answer):
        raise ValueError(f"a short answer must not hold {' '.join(tags)}")
    return _sample(line, record, prompt, SHORT + answer, long=False, from_long=False)


def _cut(sample: Sample, line: int) -> Sample:
    """The short sample that says what a long one says after its thoughts."""
    answer = sample.record["output"].partition(END_THINK)[2].strip()
    return _sample(line, sample.record, sample.record["instruction"], SHORT + answer, long=False, from_long=True)


def _pair(record: dict, columns: dict[str, str] | None) -> tuple[str, str]:
    messages = conversation(record, columns)
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError("expected one user and one assistant message")
    return messages[0]["content"], messages[1]["content"]


def _sample(line: int, record: dict, prompt: str, answer: str, *, long: bool, from_long: bool) -> Sample:
    made = {"instruction": prompt, "output": answer, "mode": "think" if long else "short"}
    made |= {name: record[name] for name in ("id", "answer") if name in record}
    stated, said = _stated(record), final_answer(answer)
    if said and stated is None:
        made["answer"] = said
    problem, claim = " ".join(prompt.split()), normalized(said or stated or "")
    facts = {
        "long": long,
        "from_long": from_long,
        "line": line,
        "problem": _hash(problem),
        "claim": _hash(problem, claim) if claim else 0,
        "wrong": bool(said and stated) and normalized(said) != normalized(stated),
    }
    return Sample(made, json.dumps(made, ensure_ascii=False).encode() + b"\n", facts)


def _stated(record: dict) -> str | None:
    """What the field `answer` of a record says; it may be a whole solution, as GSM8K's is."""
    stated = record.get("answer")
    if not isinstance(stated, str | int | float) or not str(stated).strip():
        return None
    return final_answer(str(stated)) or str(stated)


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest(), "little")


def _kept(scratch: Scratch, on_disagreement: str) -> tuple[np.ndarray, list[dict]]:
    """(numbers of the samples that stay, int64 [kept]; findings about them and about those that go)."""
    rows = scratch.rows
    dropped, against = disagreeing(rows)
    read = ~_cut_rows(rows)[dropped]  # what is cut from a wrong answer is no second finding
    found = sorted({tuple(sorted({i, j})) for i, j in zip(dropped[read].tolist(), against[read].tolist(), strict=True)})
    what = {1: "the final answer is not the field `answer`", 2: "final answers differ"}
    findings = [scratch.finding(what[len(pair)], *pair) for pair in found]
    if findings and on_disagreement == "error":
        said = " and ".join(f"{answer['says']!r} at {answer['place']}" for answer in findings[0]["answers"])
        raise ValueError(f"{len(findings):,} answers disagree; the first: {findings[0]['finding']}, {said}")
    kept = np.delete(np.arange(len(rows)), dropped)
    if not len(kept):
        raise ValueError(f"of {len(rows):,} samples none is left: {len(dropped):,} disagree with another or themselves")
    for short, long in zip(*not_shorter(rows[kept]), strict=True):
        findings.append(scratch.finding("the short answer is no shorter", kept[long], kept[short]))
    return kept, findings


def _cut_rows(rows: np.ndarray) -> np.ndarray:
    return rows["from_long"] & ~rows["long"]


def _counts(rows: np.ndarray, kept: np.ndarray, rejected: int) -> dict[str, int]:
    """What became of the records read; samples = read - rejected - disagreeing + cut."""
    records, cut = int((~_cut_rows(rows)).sum()), int(_cut_rows(rows[kept]).sum())
    return {
        "read": records + rejected,
        "rejected": rejected,
        "disagreeing": records - (len(kept) - cut),
        "cut": cut,
    }


def _write_splits(scratch: Scratch, kept: np.ndarray, held_out: float, seed: int, folder: Path) -> dict:
    """Write the samples `kept`, shuffled, and return their balance by split and mode."""
    held = held_back(scratch.rows[kept], held_out, seed)
    order = np.random.default_rng(seed).permutation(len(kept))
    kept, held, found = kept[order], held[order], {}
    for split, numbers in (("train", kept[~held]), ("heldout", kept[held])):
        if len(numbers):
            found[split] = balance(scratch.rows[numbers])
            with (folder / f"{split}.jsonl").open("wb") as file:
                file.writelines(map(scratch.line, numbers.tolist()))
    return found
