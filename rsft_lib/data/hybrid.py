"""A hybrid dataset: long answers that begin with <think> and short ones that begin with <short>, shuffled and split."""

import json
import random
from collections import Counter
from pathlib import Path

from rsft_lib.artifact import file_hash, new_folder
from rsft_lib.chat import END_THINK, SHORT, THINK
from rsft_lib.data.records import read_records, to_messages
from rsft_lib.paths import existing, resolve


def build_hybrid(long: str | Path, short: str | Path, folder: str | Path, held_out: float, seed: int) -> dict:
    """Write `train.jsonl` and `heldout.jsonl` from a file of long answers and one of short answers.

    The split is by problem: a problem's answers, long and short, go to one side.

    Args:
        long: records whose answers begin with `<think>` and close it.
        short: records whose answers are concise; `<short>` is put before them.
        held_out: share of the problems that is kept from training.

    Returns:
        The manifest's facts; `counts` has the records by split and mode.

    Raises:
        ValueError: a record is unusable; the message names its file and line.
    """
    long, short = existing(long, "long answers"), existing(short, "short answers")
    records = [_long(*item) for item in read_records(long)] + [_short(*item) for item in read_records(short)]
    problems = sorted({record["instruction"] for record in records})
    shuffle = random.Random(seed).shuffle
    shuffle(problems)
    kept_back = set(problems[: round(held_out * len(problems))])
    shuffle(records)
    splits = {
        "train": [r for r in records if r["instruction"] not in kept_back],
        "heldout": [r for r in records if r["instruction"] in kept_back],
    }
    facts = {
        "made_by": "build_hybrid",
        "sources": {str(path): file_hash(path) for path in (long, short)},
        "seed": seed,
        "counts": {name: dict(Counter(r["mode"] for r in split)) for name, split in splits.items()},
    }
    with new_folder(resolve(folder), facts) as temporary:
        for name, split in splits.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in split)
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return facts


def _long(place: str, record: dict) -> dict:
    pair = _hybrid_record(place, record, "think")
    answer = pair["output"]
    if not answer.startswith(THINK) or not answer.partition(END_THINK)[2].strip():
        raise ValueError(f"{place}: a long answer must begin with {THINK}, close it with {END_THINK} and then answer")
    return pair


def _short(place: str, record: dict) -> dict:
    pair = _hybrid_record(place, record, "short")
    if THINK in pair["output"] or END_THINK in pair["output"]:
        raise ValueError(f"{place}: a short answer must not hold {THINK} or {END_THINK}")
    return pair | {"output": SHORT + pair["output"].removeprefix(SHORT)}


def _hybrid_record(place: str, record: dict, mode: str) -> dict:
    messages = to_messages(record, place)
    if [m["role"] for m in messages] != ["user", "assistant"]:
        raise ValueError(f"{place}: expected one user and one assistant message")
    pair = {"instruction": messages[0]["content"], "output": messages[1]["content"], "mode": mode}
    return pair | ({"answer": record["answer"]} if "answer" in record else {})
