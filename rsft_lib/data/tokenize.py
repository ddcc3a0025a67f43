"""Records to tokens with a response-only loss mask: many processes, one result, in the order of the records.

A reader cuts the rows into blocks, workers encode them, and the blocks are written in their order. So the result does
not depend on how many workers there are.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path

from rsft_lib.artifact import new_folder, verify
from rsft_lib.chat import END_THINK, MODES, ChatTemplate
from rsft_lib.contract import require_contract
from rsft_lib.cores import usable_cores
from rsft_lib.data.conversation import RULES
from rsft_lib.data.pool import pool_for
from rsft_lib.data.records import Row, Source, blocks, source_of
from rsft_lib.data.rejects import Rejects
from rsft_lib.data.store import StoreWriter, is_a_part
from rsft_lib.data.worker import Block, Job, Options
from rsft_lib.paths import resolve
from rsft_lib.progress import progress
from rsft_lib.tokenizer import fingerprint, load_tokenizer

PROOF_ROWS = 256  # of this very dataset, on which encoders are compared
# Workers that one reading and writing process keeps busy: with gigatoken a block takes one of them 15 times as long as
# it takes that process, with tokenizers at least 90 times (CPU time, 2026-11, R1's traces and GSM8K).
HELPFUL, HELPFUL_WHEN_SLOW = 16, 96


def tokenize(
    data: str | Path,
    tokenizer: str | Path,
    folder: str | Path,
    max_length: int = 16384,
    *,
    reject_limit: float = 0.001,
    workers: int | None = None,
    contract: bool = True,
    overwrite: bool = False,
    **options,
) -> dict:
    """Write the records of a file as a token store; where it is there already, made from the same, it is kept.

    Args:
        data: a data file, or a dataset on the Hub by name, `org/name` or `org/name:split@revision`.
        max_length: most tokens of a sample.
        options: the other fields of `Options`: overlong, turns, control_tokens, columns.
        reject_limit: largest share of records that may be unusable; they are kept in `<folder>.rejected.jsonl`.
        workers: most processes, 0 for none but this one. No more are started than there are cores that may be used,
            blocks of 256 records, or can be kept busy; None for as many as that.
        contract: whether the tokenizer must pass `require_contract`; without it, what is trained may not be what is
            served.
        overwrite: replace `folder` where it was made from other data or another tokenizer, too.

    Returns:
        The manifest's facts; `counts` and `modes` say what became of the records, `unused_fields` which of their
        fields are no part of a conversation and in how many records, `encoder` how they were encoded.

    Raises:
        FileNotFoundError: the data or the tokenizer is missing.
        FileExistsError: `folder` is something else, or was made from other data or another tokenizer.
        ValueError: the tokenizer breaks the contract, too many records cannot be used (the message names file and
            line), there are none, or none fits.
        RuntimeError: a worker died; the message has how, and the end of its stderr.
    """
    destination, loaded = resolve(folder), load_tokenizer(tokenizer)
    settings = Options(max_length=max_length, **options)
    source = source_of(data)
    facts = _facts(source, tokenizer, loaded, settings)
    if done := _already(destination, facts):
        return done
    unread = blocks(source.rows())
    first = list(islice(unread, _most(workers)))  # a process for each, so that none starts without a block
    with pool_for(_job(str(source), loaded, settings), min(len(first), HELPFUL)) as pool:
        if contract:
            require_contract(tokenizer, loaded)
        facts["encoder"] = _chosen_encoder(pool, source.rows())
        count = min(len(first), HELPFUL_WHEN_SLOW if "why_slow" in facts["encoder"] else HELPFUL)
        pool.grow(count)
        encoded = _encoded(pool, chain(first, unread), facts["encoder"]["encoder"], ahead=2 * count + 1)
        reading = Reading(source)
        made_from = {"source": ["data", "tokenizer"], "overwrite": overwrite, "estimate": reading.estimate}
        with (
            new_folder(destination, facts, **made_from) as temporary,
            Rejects(destination, reject_limit) as rejects,
        ):
            _write(reading.progress(encoded), StoreWriter(temporary), rejects, facts)
    return facts


def _most(workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it is a number of processes, or None for as many as help")
    cores = usable_cores()
    return cores if workers is None else min(workers, cores)


def _write(encoded: Iterator[Block], writer: StoreWriter, rejects: Rejects, facts: dict) -> None:
    """Write the blocks as they come, and count in `facts` what became of the rows."""
    counts, modes, unused = Counter(), defaultdict(Counter), Counter()
    facts |= {"counts": counts, "modes": modes, "unused_fields": unused}
    for block in encoded:
        writer.add_block(block.tokens, block.loss_mask, block.lengths, block.before, block.rows)
        counts.update(block.fates.counts)
        unused.update(block.fates.unused)
        for mode, counted in block.fates.modes.items():
            modes[mode].update(counted)
        rejects.add(block.fates.rejects, counts["records"])
    rejects.settle(counts["records"])
    if not counts["written"]:
        raise ValueError(_nothing_written(counts, facts))
    writer.close()


def _nothing_written(counts: Counter, facts: dict) -> str:
    source, read = facts["data"], counts["records"]
    if not read:
        return f"{source} holds no records"
    if read == counts["rejected"]:
        return f"{source}: all {read} records are rejected; their reasons are in .rejected.jsonl beside the tokens"
    return (
        f"{source}: none of {read - counts['rejected']} usable records fits into max_length "
        f"{facts['options']['max_length']} tokens"
    )


def _job(source: str, loaded, options: Options) -> Job:
    return Job(
        source=source,
        tokenizer_json=loaded.backend_tokenizer.to_str(),
        template=ChatTemplate.of(loaded),
        added_tokens=loaded.get_added_vocab(),
        options=options,
    )


def _chosen_encoder(pool: Executor, rows: Iterator[Row]) -> dict:
    """What `best_encoder` says of the first rows; a slow one is said aloud."""
    facts = pool.submit("prove", list(islice(rows, PROOF_ROWS))).result()
    if "why_slow" in facts:
        print(f"encoding with {facts['encoder']}: {facts['why_slow']}")
    return facts


def _facts(source: Source, tokenizer, loaded, options: Options) -> dict:
    """What the manifest tells of where the tokens come from."""
    vocab = loaded.get_vocab()
    return {
        "made_by": "tokenize",
        "rules": RULES,
        **source.facts(),
        "tokenizer": str(resolve(tokenizer)),
        **fingerprint(resolve(tokenizer), loaded),
        "vocab_size": len(loaded),
        "control_ids": {token: vocab[token] for token in (*MODES.values(), END_THINK) if token in vocab},
        "eos_id": loaded.eos_token_id,
        "options": asdict(options),
    }


def _already(destination: Path, facts: dict) -> dict | None:
    """The manifest of a whole result that was made from the same, if there is one."""
    if facts["data_sha256"] is None or not destination.is_dir():
        return None
    try:
        found = verify(destination)
    except (OSError, ValueError):
        return None
    if any(found.get(name) != value for name, value in facts.items()) or is_a_part(found):
        return None
    print(f"{destination} is there already, made from the same data and tokenizer")
    return found


def _encoded(pool: Executor, unread: Iterator[list[Row]], encoder_name: str, ahead: int) -> Iterator[Block]:
    """The blocks of rows encoded, in their order; no more than `ahead` are in memory at a time."""
    waiting = deque(pool.submit("block", rows, encoder_name) for rows in islice(unread, ahead))
    while waiting:
        block = waiting.popleft().result()
        waiting.extend(pool.submit("block", rows, encoder_name) for rows in islice(unread, 1))
        yield block


class Reading:
    """How much of a source has been encoded, in bytes; `total` is 0 where that is not known."""

    def __init__(self, source: Source):
        plain = not source.split and Path(source.name).suffix in (".jsonl", ".json")
        self.total, self.done = Path(source.name).stat().st_size if plain else 0, 0

    def progress(self, encoded: Iterator[Block]) -> Iterator[Block]:
        """Pass blocks on, and show how far they are."""
        with progress("tokenize", "B", self.total or None) as bar:
            for block in encoded:
                self.done += block.size
                bar.update(block.size)
                yield block

    def estimate(self, written: int) -> int:
        """Bytes that all tokens will take, if those of the rest are as many a byte as those that are `written`."""
        return int(written * self.total / self.done) if self.done else 0
