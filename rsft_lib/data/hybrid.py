"""A hybrid dataset: long answers that begin with <think> and short ones that begin with <short>, shuffled and split.

Two passes, so that a million long traces need little memory. The first reads, checks and measures the records and
lays them down in a scratch file; about 50 bytes of each stay in memory (`pairs.ROW`). The second copies those that
stay from there in their final order. The scratch file takes as much disk as the dataset and is gone at the end.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from rsft_lib.common.artifact import file_hash, new_folder, read_manifest, verify_files
from rsft_lib.common.paths import existing, resolve
from rsft_lib.data.conversation import RULES
from rsft_lib.data.encoder import best_encoder
from rsft_lib.data.pairs import OTHER, balance, coverage, disagreeing, held_back, not_shorter
from rsft_lib.data.records import Source, source_of
from rsft_lib.data.rejects import Reject, Rejects, reject
from rsft_lib.data.samples import Sample, cut_sample, declared_sample, long_sample, short_sample
from rsft_lib.data.scratch import Scratch
from rsft_lib.tokenizer.chat import END_THINK, SHORT, THINK
from rsft_lib.tokenizer.patch import load_tokenizer

FINDINGS = "findings.jsonl"
WHAT = {long_sample: "long answers", short_sample: "short answers", declared_sample: "dataset"}


def build_hybrid(
    long: str | Path,
    short: str | Path,
    folder: str | Path,
    held_out: float,
    seed: int,
    *,
    hybrid: str | Path = "",
    cut_short: bool = False,
    tokenizer: str | Path = "",
    columns: dict[str, str] | None = None,
    empty_think: bool = False,
    on_disagreement: str = "drop",
    reject_limit: float = 0.001,
    overwrite: bool = False,
) -> dict:
    """Write `train.jsonl` and `heldout.jsonl` from long and short answers, or from a dataset that has both already.

    Where they are there already, made from the same, they are kept, and what was tokenized into their folder too.

    Any input may have problems that another has not. The split is by question, whatever its white space: all answers
    to it go to one side. `findings.jsonl` names the answers that disagree and the pairs whose short one is no shorter;
    `FOLDER.rejected.jsonl`, beside the folder, the records that cannot be used.

    Args:
        long: records whose answers are `<think>` thoughts `</think>` answer; a file, or a dataset on the Hub by name,
            `org/name` or `org/name:split@revision`.
        short: records whose answers are concise; `<short>` is put before them. Empty: they are cut from `long`,
            from after `</think>`.
        held_out: share of the questions that is kept from training; 0 for none, and then no `heldout.jsonl`.
        hybrid: records whose answers begin with `<think>` or `<short>` already, in place of `long` and `short`. A
            dataset without any control token is taken too: its samples are of one mode, 'other'.
        cut_short: cut short answers, too, to the problems that `short` does not have.
        tokenizer: folder of the tokenizer that measures lengths; empty measures characters.
        columns: what all of them call a field, e.g. {'prompt': 'question', 'response': 'answer'}.
        empty_think: accept `<think>` with nothing in it.
        on_disagreement: 'drop' or 'error', for answers to one problem whose final answers are not the same.
        reject_limit: largest share of the records that may be unusable.
        overwrite: replace `folder` where it was made from other answers, too.

    Returns:
        The manifest's facts. `counts` has the samples by split and mode, `balance` also the length of their prompts
        and answers in `unit`, `problems` how many are answered in which modes, `records` what became of those read,
        `unused_fields` the fields that are in no sample, with the number of records.

    Raises:
        FileExistsError: `folder` is something else, or was made from other answers.
        ValueError: too many records are unusable, answers disagree where that is an error, an input is empty, or
            nothing is left.
    """
    if not 0 <= held_out < 1 or on_disagreement not in ("drop", "error"):
        raise ValueError(f"{held_out=} must be from 0 to below 1, and {on_disagreement=} 'drop' or 'error'")
    if hybrid and cut_short:
        raise ValueError("cut_short is for `long`: a hybrid dataset has the short answers that it has")
    inputs = [(long, long_sample), *([(short, short_sample)] if short else [])]
    inputs = [(source_of(data, WHAT[make]), make) for data, make in ([(hybrid, declared_sample)] if hybrid else inputs)]
    sources = [source for source, _ in inputs]
    facts = {"made_by": "build_hybrid", "rules": RULES}
    facts["sources"] = {str(source): source.facts()["data_sha256"] for source in sources}
    facts |= {
        "held_out": held_out, "seed": seed, "cut_short": cut_short, "columns": columns or {},
        "empty_think": empty_think, "on_disagreement": on_disagreement, "unit": "tokens" if tokenizer else "characters",
        "tokenizer_sha256": file_hash(existing(Path(tokenizer) / "tokenizer.json", "tokenizer")) if tokenizer else "",
    }  # fmt: skip
    destination = resolve(folder)
    if done := _already(destination, facts):
        return done
    estimate = partial(_estimate, sources)
    with (
        new_folder(destination, facts, source=["sources"], overwrite=overwrite, estimate=estimate) as temporary,
        TemporaryFile(dir=temporary) as file,
        Rejects(destination, reject_limit) as rejects,
    ):
        scratch = Scratch(file, sources)
        reader = Reader(inputs, columns or {}, empty_think, rejects)
        scratch.fill(reader.samples(cut_short or not (short or hybrid)), _measure(tokenizer))
        reader.refuse_empty()
        _refuse_undeclared(scratch, rejects, reader.read.total())
        rejects.settle(reader.read.total())
        kept, findings = _kept(scratch, on_disagreement)
        facts["records"] = _counts(scratch.rows, kept, rejects.count)
        facts["problems"] = coverage(scratch.rows[kept])
        facts["findings"] = dict(Counter(finding["finding"] for finding in findings))
        facts["unused_fields"] = dict(reader.unused)
        facts["balance"] = found = _write_splits(scratch, kept, held_out, seed, temporary)
        facts["counts"] = {s: {mode: n["samples"] for mode, n in modes.items()} for s, modes in found.items()}
        lines = (json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings)
        (temporary / FINDINGS).write_text("".join(lines), encoding="utf-8")
    return facts


def _estimate(sources: list[Source], written: int) -> int:
    """Bytes that the scratch file and the dataset take beside it; 0 where the sources are no plain files."""
    files = [Path(source.name) for source in sources]
    plain = all(path.is_file() and path.suffix in (".jsonl", ".json") for path in files)
    return 2 * sum(path.stat().st_size for path in files) if plain else 0


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
    tokenizer_json, chosen = loaded.backend_tokenizer.to_str(), []

    def lengths(texts: list[str]) -> list[int]:
        if not chosen:
            chosen.append(best_encoder(tokenizer_json, texts)[0])
        return [len(tokens.ids) for tokens in chosen[0].encode(texts, [[]] * len(texts))]

    return lengths


class Reader:
    """Reads sources as samples and counts what it reads; a record that raises anything at all is rejected."""

    def __init__(
        self, inputs: list[tuple[Source, Callable]], columns: dict[str, str], empty_think: bool, rejects: Rejects
    ):
        self.inputs = inputs
        self.columns, self.empty_think, self.rejects = columns, empty_think, rejects
        self.read, self.used, self.unused = Counter(), Counter(), Counter()

    def samples(self, cut: bool) -> Iterator[Sample]:
        """All samples, short answers first; with `cut`, a short one from each long one whose problem has none."""
        answered = set()
        for number in reversed(range(len(self.inputs))):
            for sample in self._of(number):
                yield sample
                if not cut:
                    continue
                if self.inputs[number][1] is short_sample:
                    answered.add(sample.facts["problem"])
                elif sample.facts["problem"] not in answered:
                    yield cut_sample(sample)

    def _of(self, number: int) -> Iterator[Sample]:
        source, make = self.inputs[number]
        for row in source.rows():
            self.read[number] += 1
            try:
                sample = make(row, self.columns, self.empty_think)
            except Exception as error:
                self.rejects.add([reject(str(source), row, error)], seen=self.read.total())
                continue
            self.used[number] += 1
            self.unused.update(sample.unused)
            sample.facts["source"] = number
            yield sample

    def refuse_empty(self) -> None:
        """Check that every source gave a sample.

        Raises:
            ValueError: one has no records; or all of its records were rejected, with the reason of the first.
        """
        for number, (source, make) in enumerate(self.inputs):
            if not self.read[number]:
                raise ValueError(f"{WHAT[make]}: {source} holds no records")
            if not self.used[number]:
                self.rejects.settle(self.read.total())
                raise ValueError(f"{WHAT[make]}: all {self.read[number]:,} records of {source} are rejected")


def _refuse_undeclared(scratch: Scratch, rejects: Rejects, read: int) -> None:
    """Where any answer declares its mode, those that do not are rejected: they would teach a third."""
    others = scratch.rows["mode"] == OTHER
    if others.all() or not others.any():
        return
    reason = f"the answer begins with neither {THINK} nor {SHORT}, as {(~others).sum():,} others of this dataset do"
    for number in np.flatnonzero(others).tolist():
        row = scratch.rows[number]
        found = Reject(str(scratch.sources[row["source"]]), int(row["line"]), reason, scratch.line(number).decode())
        rejects.add([found], seen=read)
    scratch.rows = scratch.rows[~others]


def _kept(scratch: Scratch, on_disagreement: str) -> tuple[np.ndarray, list[dict]]:
    """(numbers of the samples that stay, int64 [kept]; findings about them and about those that go)."""
    rows = scratch.rows
    dropped, against = disagreeing(rows)
    read = ~rows["cut"][dropped]  # what is cut from a wrong answer is no second finding
    found = sorted({tuple(sorted({i, j})) for i, j in zip(dropped[read].tolist(), against[read].tolist(), strict=True)})
    what = {1: "the final answer is not the field `answer`", 2: "final answers differ"}
    findings = [scratch.finding(what[len(pair)], *pair) for pair in found]
    if findings and on_disagreement == "error":
        said = " and ".join(f"{answer['says']!r} at {answer['place']}" for answer in findings[0]["answers"])
        raise ValueError(f"{len(findings):,} answers disagree; the first: {findings[0]['finding']}, {said}")
    kept = np.delete(np.arange(len(rows)), dropped)
    if not len(kept):
        raise ValueError(
            f"no sample is left: {len(dropped):,} of {len(rows):,} are dropped because their final answers disagree "
            "with each other or with the field `answer`"
        )
    for short, long in zip(*not_shorter(rows[kept]), strict=True):
        findings.append(scratch.finding("the short answer is no shorter", kept[long], kept[short]))
    return kept, findings


def _counts(rows: np.ndarray, kept: np.ndarray, rejected: int) -> dict[str, int]:
    """What became of the records read; samples = read - rejected - disagreeing + cut."""
    records, cut = int((~rows["cut"]).sum()), int(rows["cut"][kept].sum())
    return {
        "read": records + rejected,
        "rejected": rejected,
        "disagreeing": records - (len(kept) - cut),
        "cut": cut,
    }


def _write_splits(scratch: Scratch, kept: np.ndarray, held_out: float, seed: int, folder: Path) -> dict:
    """Write the samples `kept`, shuffled, and return their balance by split and mode."""
    held = held_back(scratch.rows[kept], held_out, seed)
    if held_out and not held.any():
        print("there is only one question, so nothing is held out: heldout.jsonl is not written")
    order = np.random.default_rng(seed).permutation(len(kept))
    kept, held, found = kept[order], held[order], {}
    for split, numbers in (("train", kept[~held]), ("heldout", kept[held])):
        if len(numbers):
            found[split] = balance(scratch.rows[numbers])
            with (folder / f"{split}.jsonl").open("wb") as file:
                file.writelines(map(scratch.line, numbers.tolist()))
    return found
