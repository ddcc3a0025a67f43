"""Tokenize records in parallel, with a response-only loss mask.

A reader groups rows into blocks, workers encode them, and the blocks are written in order, so the result does not
depend on the number of workers.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

from rsft_lib.common.artifact import new_folder, own_manifest, read_manifest, reusable
from rsft_lib.common.cores import usable_cores
from rsft_lib.common.paths import resolve
from rsft_lib.common.progress import progress
from rsft_lib.data.conversation import RULES
from rsft_lib.data.options import Options
from rsft_lib.data.pool import InProcess, Pool, pool_for
from rsft_lib.data.records import Row, Source, blocks, source_of
from rsft_lib.data.rejects import Rejects
from rsft_lib.data.store import StoreWriter, is_a_part
from rsft_lib.data.worker import Block, Job
from rsft_lib.tokenizer.chat import ChatTemplate
from rsft_lib.tokenizer.contract import require_contract
from rsft_lib.tokenizer.dialect import MODES, THINKLESS, choice_of, openings_of
from rsft_lib.tokenizer.patch import fingerprint, load_tokenizer

COMPARED_ROWS = 256  # rows of the dataset on which encoders are compared
# Workers that one reading and writing process can keep busy: encoding a block takes 15 times as long as reading and
# writing it with gigatoken, at least 90 times with tokenizers (CPU time, 2026-11, R1's traces and GSM8K).
USEFUL_WORKERS, USEFUL_WORKERS_WHEN_SLOW = 16, 96


def tokenize(
    data: str | Path,
    tokenizer: str | Path,
    folder: str | Path,
    max_length: int = 16384,
    *,
    reject_limit: float = 0.001,
    workers: int | None = None,
    overwrite: bool = False,
    **options,
) -> dict:
    """Write the records of `data` as a token store; an existing store made from the same inputs is kept.

    Args:
        data: a data file, or a dataset on the Hub by name, `org/name` or `org/name:split@revision`.
        max_length: maximum number of tokens of a sample.
        options: the other fields of `Options`: overlong, turns, control_tokens, columns, dialect, empty_block.
        reject_limit: maximum fraction of unusable records; they are saved in `<folder>.rejected.jsonl`.
        workers: maximum number of processes; 0 to tokenize in this one, None for no maximum. It is capped by the usable
            cores, the blocks of 256 records, and the number that the reader can keep busy.
        overwrite: also replace a `folder` made from other data or another tokenizer.

    Returns:
        The manifest; `counts` and `modes`: numbers of records and tokens by outcome and by mode; `unused_fields`: field
        -> number of records in which it is not part of the conversation; `encoder`: the result of `best_encoder`.

    Raises:
        FileNotFoundError: the data or the tokenizer is missing.
        FileExistsError: `folder` is something else, or was made from other data or another tokenizer.
        ValueError: the data was built for another dialect, the tokenizer breaks the contract, too many records are
            unusable (the message has file and line), there are none, or all are too long.
        RuntimeError: a worker died; the message has its exit status and the end of its stderr.
    """
    destination, loaded = resolve(folder), load_tokenizer(tokenizer)
    settings = Options(max_length=max_length, **options)
    source = source_of(data)
    _refuse_another_dialect(source, settings)
    facts = _facts(source, tokenizer, loaded, settings)
    whole = lambda: not is_a_part(read_manifest(destination))  # noqa: E731
    if facts["data_sha256"] is not None and (done := reusable(destination, facts, unchanged=whole)):
        return done
    unread = blocks(source.rows())
    first = list(islice(unread, _max_workers(workers)))  # one block per process, so that none starts idle
    job = Job(
        source=str(source), tokenizer_json=loaded.backend_tokenizer.to_str(), template=ChatTemplate.of(loaded),
        added_tokens=loaded.get_added_vocab(), options=settings, openings=openings_of(loaded, settings.forms),
    )  # fmt: skip
    with pool_for(job, min(len(first), USEFUL_WORKERS)) as pool:
        require_contract(tokenizer, loaded, settings.forms)
        facts["encoder"] = _chosen_encoder(pool, source.rows())
        count = min(len(first), USEFUL_WORKERS_WHEN_SLOW if "why_slow" in facts["encoder"] else USEFUL_WORKERS)
        pool.grow(count)
        encoded = _encoded(pool, chain(first, unread), facts["encoder"]["encoder"], ahead=2 * count + 1)
        input_progress = InputProgress(source)
        made_from, estimate = ["data", "tokenizer"], input_progress.estimate
        with (
            new_folder(destination, facts, source=made_from, overwrite=overwrite, estimate=estimate) as temporary,
            Rejects(destination, reject_limit) as rejects,
        ):
            _write(input_progress.show(encoded), StoreWriter(temporary), rejects, facts)
    return facts


def _refuse_another_dialect(source: Source, options: Options) -> None:
    """Refuse a dataset that notebook 03 built for another dialect: its answers would count as those of other modes."""
    facts = {} if source.split else own_manifest(Path(source.name).parent)
    built = facts.get("dialect", THINKLESS.name)
    if facts.get("made_by") == "build_hybrid" and built != options.dialect:
        raise ValueError(
            f"{source} was built for the dialect {built}, but dialect is {options.dialect!r}: set it to {built!r}, or "
            "build the dataset again (notebook 03_build_dataset)"
        )


def _max_workers(workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be a number of processes, or None for no maximum")
    cores = usable_cores()
    return cores if workers is None else min(workers, cores)


def _write(encoded: Iterator[Block], writer: StoreWriter, rejects: Rejects, facts: dict) -> None:
    """Write the blocks in order, and add the counts of rows and fields to `facts`."""
    counts: Counter[str] = Counter()
    modes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    unused: Counter[str] = Counter()
    facts |= {"counts": counts, "modes": modes, "unused_fields": unused}
    for block in encoded:
        writer.add_block(block.tokens, block.loss_mask, block.lengths, block.before, block.rows)
        counts.update(block.outcomes.counts)
        unused.update(block.outcomes.unused)
        for mode, counted in block.outcomes.modes.items():
            modes[mode].update(counted)
        rejects.add(block.outcomes.rejects, counts["records"])
    rejects.settle(counts["records"])
    if not counts["written"]:
        raise ValueError(_nothing_written(counts, facts))
    writer.close()


def _nothing_written(counts: Counter, facts: dict) -> str:
    source, read = facts["data"], counts["records"]
    if not read:
        return f"{source} contains no records"
    if read == counts["rejected"]:
        return f"{source}: all {read} records are rejected; the reasons are in .rejected.jsonl beside the tokens"
    return (
        f"{source}: none of {read - counts['rejected']} usable records fits into max_length "
        f"{facts['options']['max_length']} tokens; raise max_length"
    )


def _chosen_encoder(pool: Pool | InProcess, rows: Iterator[Row]) -> dict:
    """The facts of `best_encoder` for the first rows; a message is printed if the slow encoder is used."""
    facts = pool.submit("choose_encoder", list(islice(rows, COMPARED_ROWS))).result()
    if "why_slow" in facts:
        print(f"encoding with {facts['encoder']}: {facts['why_slow']}")
    return facts


def _facts(source: Source, tokenizer, loaded, options: Options) -> dict:
    """The manifest entries that identify the inputs and options."""
    vocab, openings = loaded.get_vocab(), openings_of(loaded, options.forms)
    return {
        "made_by": "tokenize",
        "rules": RULES,
        **source.facts(),
        "tokenizer": str(resolve(tokenizer)),
        **fingerprint(resolve(tokenizer), loaded),
        "vocab_size": len(loaded),
        "openings": {mode: [list(found.ids), found.offset] for mode, found in zip(MODES, openings, strict=True)},
        "control_ids": {token: vocab[token] for token in THINKLESS.tags if token in vocab},
        "choice": list(choice_of(loaded, options.forms)),
        "eos_id": loaded.eos_token_id,
        "options": asdict(options),
    }


def _encoded(pool: Pool | InProcess, unread: Iterator[list[Row]], encoder_name: str, ahead: int) -> Iterator[Block]:
    """The encoded blocks, in order; at most `ahead` are in memory at a time."""
    pending = deque(pool.submit("block", rows, encoder_name) for rows in islice(unread, ahead))
    while pending:
        block = pending.popleft().result()
        pending.extend(pool.submit("block", rows, encoder_name) for rows in islice(unread, 1))
        yield block


class InputProgress:
    """Bytes of a source encoded so far; `total` is 0 if unknown."""

    def __init__(self, source: Source):
        plain = not source.split and Path(source.name).suffix in (".jsonl", ".json")
        self.total, self.done = Path(source.name).stat().st_size if plain else 0, 0

    def show(self, encoded: Iterator[Block]) -> Iterator[Block]:
        """Yield the blocks while showing a progress bar."""
        with progress("tokenize", "B", self.total or None) as bar:
            for block in encoded:
                self.done += block.size
                bar.update(block.size)
                yield block

    def estimate(self, written: int) -> int:
        """The expected total of bytes written, extrapolated from those `written` for the input so far."""
        return int(written * self.total / self.done) if self.done else 0
