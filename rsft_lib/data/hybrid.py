"""Build a hybrid dataset: long answers that begin with <think> and short ones that begin with <short>.

In Qwen3's dialect the question asks for a mode, and a short answer begins with an empty think block
(`tokenizer.dialect`).

Two passes keep memory low for a million long traces. The first reads, checks and measures the records and writes them
to a scratch file, keeping about 50 bytes of each in memory (`pairs.ROW`). The second copies the kept ones, shuffled and
split. The scratch file needs as much disk as the dataset and is removed at the end.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from rsft_lib.common.artifact import file_hash, new_folder, reusable
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.data.budgets import Budgets, cut_thoughts
from rsft_lib.data.conversation import RULES
from rsft_lib.data.encoder import Encoder, Tokens, best_encoder
from rsft_lib.data.pairs import OTHER, balance, coverage, disagreeing, held_back, not_shorter, unneeded
from rsft_lib.data.records import Source, source_of
from rsft_lib.data.rejects import Reject, Rejects, reject
from rsft_lib.data.samples import Sample, Style, cut_sample, declared_sample, long_sample, short_sample
from rsft_lib.data.scratch import Scratch
from rsft_lib.tokenizer.dialect import TAGS, THINKLESS, Dialect, dialect_of
from rsft_lib.tokenizer.patch import load_tokenizer

FINDINGS = "findings.jsonl"
INPUT_NAMES = {long_sample: "long answers", short_sample: "short answers", declared_sample: "dataset"}


def build_hybrid(
    long: str | Path,
    short: str | Path,
    folder: str | Path,
    held_out: float,
    seed: int,
    *,
    hybrid: str | Path = "",
    cut_short: bool = False,
    modes: str = "both",
    short_up_to: float = 0.0,
    budget_share: float = 0.0,
    budget_min: int = 1,
    budget_max: int = 0,
    tokenizer: str | Path = "",
    columns: dict[str, str] | None = None,
    dialect: str = THINKLESS.name,
    empty_think: bool = False,
    on_disagreement: str = "drop",
    reject_limit: float = 0.001,
    overwrite: bool = False,
) -> dict:
    """Write `train.jsonl` and `heldout.jsonl` from long and short answers, or from a dataset that contains both.

    An existing dataset made from the same inputs and settings is kept, including tokens stored in its folder.

    The inputs may cover different problems. The split is by question, ignoring white space: all answers to a question
    are in the same split. `findings.jsonl` lists the answers that disagree and the pairs whose short answer is not
    shorter; `FOLDER.rejected.jsonl`, beside the folder, lists the unusable records.

    Args:
        long: records whose answers are `<think>` thoughts `</think>` answer; a file, or a dataset on the Hub by name,
            `org/name` or `org/name:split@revision`.
        short: records with concise answers; `<short>`, or what the dialect writes, is prepended to them. Empty: they
            are cut from `long`, as the text after `</think>`.
        held_out: fraction of the questions in the held-out set; 0 for no `heldout.jsonl`.
        hybrid: records whose answers already begin with `<think>` or `<short>`, or as in the dialect, in place of
            `long` and `short`. A dataset without control tokens is accepted too: all of its samples have the mode
            'other'.
        cut_short: also cut short answers for the problems that `short` lacks.
        modes: 'both' trains every control token, so that a model chooses between modes at random; 'by_need' teaches it
            to choose: of a problem with answers in both modes, only the control token of the one that it needs is
            trained, short where a short answer is known to be right. The other answer has `mode_given`, so that the
            model can still be asked for either mode.
        short_up_to: with 'by_need', the maximum difficulty of problems answered short, by the field `difficulty`, or,
            of notebook 10's pairs, the share of wrong short answers (1 - `short_right`); 0 for any.
        budget_share: fraction of the long answers in the training set that get a thinking budget, drawn uniformly from
            `budget_min` to `budget_max` tokens (0: to the length of their own thoughts). Longer thoughts are cut there:
            the sample has `thoughts_cut`, and its `</think>` is not trained (`data.budgets`). It needs `tokenizer`.
        tokenizer: folder of the tokenizer that measures lengths; empty to measure characters.
        columns: field -> its name in the inputs, e.g. {'prompt': 'question', 'response': 'answer'}.
        dialect: how prompts ask for a mode and answers begin in it, a name in `tokenizer.dialect.DIALECTS`; earlier
            turns without a mode are copied.
        empty_think: accept an empty chain of thought.
        on_disagreement: 'drop' or 'error', for answers to one problem with different final answers.
        reject_limit: maximum fraction of unusable records.
        overwrite: also replace a `folder` made from other answers.

    Returns:
        The manifest. `counts`: samples by split and mode; `balance`: also the lengths of their prompts and answers in
        `unit`; `problems`: their number by the modes of their answers; `records`: numbers read, rejected, dropped and
        cut; `unused_fields`: field -> number of records in which it is in no sample; with budgets `thoughts_cut`: what
        `budgets.cut_thoughts` returns.

    Raises:
        FileExistsError: `folder` is something else, or was made from other answers.
        ValueError: too many records are unusable, answers disagree and `on_disagreement` is 'error', an input is
            empty, or no sample is left.
    """
    forms = dialect_of({"dialect": dialect})
    if not 0 <= held_out < 1 or on_disagreement not in ("drop", "error"):
        raise ValueError(f"{held_out=} must be at least 0 and below 1, and {on_disagreement=} 'drop' or 'error'")
    if empty_think and forms.empty_block:
        raise ValueError(f"empty_think: in the dialect {dialect} an empty chain of thought is the short mode")
    if hybrid and cut_short:
        raise ValueError("cut_short is for `long`: from a hybrid dataset no short answers are cut")
    _check_modes(modes, short_up_to, forms, bool(short or hybrid))
    budgets = Budgets(budget_share, budget_min, budget_max)
    budgets.check(tokenizer)
    given = [(long, long_sample), *([(short, short_sample)] if short else [])]
    given = [(hybrid, declared_sample)] if hybrid else given
    inputs = [(source_of(data, INPUT_NAMES[make]), make) for data, make in given]
    sources = [source for source, _ in inputs]
    facts: dict = {
        "made_by": "build_hybrid", "rules": RULES,
        "sources": {str(source): source.facts()["data_sha256"] for source in sources},
        "held_out": held_out, "seed": seed, "cut_short": cut_short, "columns": columns or {},
        "dialect": dialect, "empty_think": empty_think, "modes": modes, "short_up_to": short_up_to,
        "on_disagreement": on_disagreement, "unit": "tokens" if tokenizer else "characters",
        "tokenizer_sha256": _tokenizer_hash(tokenizer),
        "budgets": budgets._asdict() if budget_share else None,
    }  # fmt: skip
    destination = resolve(folder)
    known = None not in facts["sources"].values()
    if known and (done := reusable(destination, facts, nested=True)):  # its folder may also hold tokens
        return done
    estimate = partial(_estimate, sources)
    with (
        new_folder(destination, facts, source=["sources"], overwrite=overwrite, estimate=estimate) as temporary,
        TemporaryFile(dir=temporary) as file,
        Rejects(destination, reject_limit) as rejects,
    ):
        scratch = Scratch(file, sources)
        reader = Reader(inputs, columns or {}, Style(forms, empty_think), rejects)
        scratch.fill(reader.samples(cut_short or not (short or hybrid)), _measure(tokenizer, forms))
        reader.refuse_empty()
        _refuse_undeclared(scratch, rejects, reader.read.total(), forms)
        rejects.settle(reader.read.total())
        kept, findings = _consistent(scratch, on_disagreement)
        if modes == "by_need":
            _mark_unneeded(scratch.rows, kept, short_up_to)
        facts["records"] = _counts(scratch.rows, kept, rejects.count)
        facts["problems"] = coverage(scratch.rows[kept])
        facts["findings"] = dict(Counter(finding["finding"] for finding in findings))
        facts["unused_fields"] = dict(reader.unused)
        held = _held_back(scratch.rows[kept], held_out, seed)
        if budget_share:
            tokenizer_json = load_tokenizer(tokenizer).backend_tokenizer.to_str()
            facts["thoughts_cut"] = cut_thoughts(scratch, kept[~held], tokenizer_json, budgets, seed)
        facts["balance"] = splits = _write_splits(scratch, kept, held, seed, temporary)
        facts["counts"] = {s: {mode: n["samples"] for mode, n in modes.items()} for s, modes in splits.items()}
        lines = (json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings)
        (temporary / FINDINGS).write_text("".join(lines), encoding="utf-8")
    return facts


def _check_modes(modes: str, short_up_to: float, dialect: Dialect, answered_short: bool) -> None:
    if modes not in ("both", "by_need"):
        raise ValueError(f"{modes=} must be 'both' or 'by_need'")
    if modes == "both" and short_up_to:
        raise ValueError(f"{short_up_to=} is for modes 'by_need'; modes is 'both', which keeps all short answers")
    if modes == "by_need" and dialect.empty_block:
        raise ValueError(
            f"modes is 'by_need', but in the dialect {dialect.name} the question chooses the mode: use 'both'"
        )
    if modes == "by_need" and not (answered_short or short_up_to):
        raise ValueError(
            "modes is 'by_need', but there are no short answers; those cut from long ones do not show which problems "
            "need no thoughts. Give `short`, or `short_up_to`, a maximum difficulty"
        )


def _tokenizer_hash(tokenizer: str | Path) -> str:
    return file_hash(require_path(Path(tokenizer) / "tokenizer.json", "tokenizer")) if tokenizer else ""


def _estimate(sources: list[Source], written: int) -> int:
    """Bytes needed by the scratch file and the dataset; 0 (unknown) unless the sources are uncompressed files."""
    files = [Path(source.name) for source in sources]
    plain = all(path.is_file() and path.suffix in (".jsonl", ".json") for path in files)
    return 2 * sum(path.stat().st_size for path in files) if plain else 0


def _measure(tokenizer: str | Path, dialect: Dialect) -> Callable[[list[str]], list[int]]:
    """A function that returns the lengths of texts, in tokens, or in characters without a tokenizer."""
    if not tokenizer:
        return lambda texts: [len(text) for text in texts]
    loaded = load_tokenizer(tokenizer)
    split = [tag for tag in dialect.tags if len(loaded.encode(tag, add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"{tokenizer}: {', '.join(split)} is not one token; patch it (notebook 01_patch_tokenizer)")
    tokenizer_json = loaded.backend_tokenizer.to_str()
    chosen: list[Encoder] = []

    def lengths(texts: list[str]) -> list[int]:
        if not chosen:
            chosen.append(best_encoder(tokenizer_json, texts)[0])
        return [_length(tokens) for tokens in chosen[0].encode(texts, [[]] * len(texts))]

    return lengths


def _length(tokens: Tokens | ValueError) -> int:
    """The number of tokens of a text that was encoded without spans."""
    if isinstance(tokens, ValueError):  # a token crosses the boundary of a span, and there are none
        raise tokens
    return len(tokens.ids)


class Reader:
    """Reads sources as samples and counts records; a record that raises any exception is rejected."""

    def __init__(self, inputs: list[tuple[Source, Callable]], columns: dict[str, str], style: Style, rejects: Rejects):
        self.inputs = inputs
        self.columns, self.style, self.rejects = columns, style, rejects
        self.read: Counter[int] = Counter()
        self.used: Counter[int] = Counter()
        self.unused: Counter[str] = Counter()

    def samples(self, cut: bool) -> Iterator[Sample]:
        """All samples, short ones first; with `cut`, also a short one from each long one whose problem has none."""
        answered = set()
        for number in reversed(range(len(self.inputs))):
            for sample in self._of(number):
                yield sample
                if not cut:
                    continue
                if self.inputs[number][1] is short_sample:
                    answered.add(sample.facts["problem"])
                elif sample.facts["problem"] not in answered:
                    yield cut_sample(sample, self.style.dialect)

    def _of(self, number: int) -> Iterator[Sample]:
        source, make = self.inputs[number]
        for row in source.rows():
            self.read[number] += 1
            try:
                sample = make(row, self.columns, self.style)
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
            ValueError: a source has no records, or all of them were rejected; the message has the first reason.
        """
        for number, (source, make) in enumerate(self.inputs):
            if not self.read[number]:
                raise ValueError(f"{INPUT_NAMES[make]}: {source} contains no records")
            if not self.used[number]:
                self.rejects.settle(self.read.total())
                raise ValueError(f"{INPUT_NAMES[make]}: all {self.read[number]:,} records of {source} are rejected")


def _refuse_undeclared(scratch: Scratch, rejects: Rejects, read: int, dialect: Dialect) -> None:
    """Reject answers without a mode if other answers declare one: they would train a third mode."""
    others = scratch.rows["mode"] == OTHER
    if others.all() or not others.any():
        return
    first = dict.fromkeys(TAGS.findall(form.opening)[0] for form in dialect.forms.values())
    begins = f"begins with neither {' nor '.join(first)}" if len(first) > 1 else f"does not begin with {[*first][0]}"
    reason = f"the answer {begins}, as {(~others).sum():,} others of this dataset do"
    for number in np.flatnonzero(others).tolist():
        row = scratch.rows[number]
        rejected = Reject(str(scratch.sources[row["source"]]), int(row["line"]), reason, scratch.line(number).decode())
        rejects.add([rejected], seen=read)
    scratch.rows = scratch.rows[~others]


def _consistent(scratch: Scratch, on_disagreement: str) -> tuple[np.ndarray, list[dict]]:
    """(numbers of the samples to keep, int64 [kept]; findings about kept and dropped samples)."""
    rows = scratch.rows
    dropped, against = disagreeing(rows)
    read = ~rows["cut"][dropped]  # a sample cut from a wrong answer is not a second finding
    pairs = sorted({tuple(sorted({i, j})) for i, j in zip(dropped[read].tolist(), against[read].tolist(), strict=True)})
    what = {1: "the final answer is not the field `answer`", 2: "final answers differ"}
    findings = [scratch.finding(what[len(pair)], *pair) for pair in pairs]
    if findings and on_disagreement == "error":
        answers = " and ".join(f"{answer['says']!r} at {answer['place']}" for answer in findings[0]["answers"])
        raise ValueError(f"{len(findings):,} answers disagree; the first: {findings[0]['finding']}, {answers}")
    kept = np.delete(np.arange(len(rows)), dropped)
    if not len(kept):
        raise ValueError(
            f"no sample is left: {len(dropped):,} of {len(rows):,} are dropped because their final answers disagree "
            "with each other or with the field `answer`"
        )
    for short, long in zip(*not_shorter(rows[kept]), strict=True):
        findings.append(scratch.finding("the short answer is no shorter", kept[long], kept[short]))
    return kept, findings


def _mark_unneeded(rows: np.ndarray, kept: np.ndarray, short_up_to: float) -> None:
    """Mark the samples of `kept` in a mode that their problem does not need as of a given mode."""
    if short_up_to and np.isnan(rows["difficulty"][kept]).all():
        raise ValueError(f"{short_up_to=}, but no record has a number in the field `difficulty`; name it in `columns`")
    rows["given"] = False  # also where an earlier build has set it
    rows["given"][kept[unneeded(rows[kept], short_up_to)]] = True


def _counts(rows: np.ndarray, kept: np.ndarray, rejected: int) -> dict[str, int]:
    """Numbers of records; samples = read - rejected - disagreeing + cut."""
    records, cut = int((~rows["cut"]).sum()), int(rows["cut"][kept].sum())
    return {
        "read": records + rejected,
        "rejected": rejected,
        "disagreeing": records - (len(kept) - cut),
        "cut": cut,
    }


def _held_back(rows: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """`pairs.held_back`, with a message if there is nothing to hold out."""
    held = held_back(rows, held_out, seed)
    if held_out and not held.any():
        print("there is only one question, so nothing is held out: heldout.jsonl is not written")
    return held


def _write_splits(scratch: Scratch, kept: np.ndarray, held: np.ndarray, seed: int, folder: Path) -> dict:
    """Write the samples `kept`, shuffled, and return their balance by split and mode; `held`: bool [kept]."""
    order = np.random.default_rng(seed).permutation(len(kept))
    kept, held, balances = kept[order], held[order], {}
    for split, numbers in (("train", kept[~held]), ("heldout", kept[held])):
        if len(numbers):
            balances[split] = balance(scratch.rows[numbers])
            with (folder / f"{split}.jsonl").open("wb") as file:
                file.writelines(map(scratch.line, numbers.tolist()))
    return balances
