"""Time and peak memory to build and tokenize a ready hybrid dataset, by file format and number of rows.

    RSFT_REAL_DATA=FOLDER python benchmarks/build_data.py [--rows 10000 1000000] [--kinds json jsonl parquet]

FOLDER contains `tokenizers/r1-distill-qwen` and `data/long_planbench_r1.jsonl.gz`, whose traces, cut to 20,000
characters, are the long answers; each problem also has a short one. All figures are from one run.

copy      `shutil.copyfile` of the file with fsync, twice, since building writes the data twice
build     `build_hybrid`: reading, checking, measuring in tokens, comparing, splitting, writing
tokenize  `tokenize` of its training split
memory    peak of the process and of a worker over the whole run; 'imports' is the memory after imports
"""

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.patch import patch_tokenizer

REAL = Path(os.environ["RSFT_REAL_DATA"])
LONG = 20_000  # most characters of a long answer, so that a million rows, half of them short, are 8 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--kinds", nargs="+", default=["json", "jsonl", "parquet"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch_tokenizer(REAL / "tokenizers" / "r1-distill-qwen", folder / "tokenizer", {"<|quad_start|>": "<short>"})
        print(f"{'kind':<8} {'rows':>9} {'GB':>6} {'copy':>8} {'build':>8} {'tokenize':>9} {'build':>7} {'tokenize':>9}"
              f" {'memory':>8} {'a worker':>9} {'imports':>8}")  # fmt: skip
        for kind in arguments.kinds:
            for rows in arguments.rows:
                measure(folder, kind, rows)


def measure(folder: Path, kind: str, rows: int) -> None:
    data = write(folder / f"data.{kind}", rows)
    size, copied = data.stat().st_size, seconds_of_copies(data)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(folder, data, sender))
    process.start()
    built, tokenized, start, peak, worker = receiver.recv()
    process.join()
    print(
        f"{kind:<8} {rows:>9,} {size / 1e9:>6.3f} {copied:>6.1f} s {built:>6.0f} s {tokenized:>7.0f} s"
        f" {size / built / 1e6:>5.1f}/s {size / tokenized / 1e6:>5.1f} MB/s {peak:>5.0f} MB {worker:>6.0f} MB"
        f" {start:>5.0f} MB",
        flush=True,
    )
    for path in folder.glob("*"):
        if path.name != "tokenizer":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(folder: Path, data: Path, sender) -> None:
    def peak(who: int) -> float:
        return resource.getrusage(who).ru_maxrss / 1e3

    start, began = peak(resource.RUSAGE_SELF), time.perf_counter()
    build_hybrid("", "", folder / "built", 0.01, 1, hybrid=data, tokenizer=folder / "tokenizer")
    built = time.perf_counter()
    tokenize(folder / "built" / "train.jsonl", folder / "tokenizer", folder / "tokens", 16_384)
    done = time.perf_counter()
    sender.send((built - began, done - built, start, peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)))


def write(path: Path, rows: int) -> Path:
    """The dataset as JSON Lines, as one JSON list, or as Parquet."""
    if path.suffix == ".parquet":
        schema = pyarrow.schema([("instruction", pyarrow.string()), ("output", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as writer:
            for part in parts(rows):
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
        return path
    between, ends = {".jsonl": ("\n", ("", "\n")), ".json": (",\n", ("[", "]"))}[path.suffix]
    with path.open("w") as file:
        file.write(ends[0])
        for number, part in enumerate(parts(rows)):
            file.write(between * bool(number) + between.join(json.dumps(row, ensure_ascii=False) for row in part))
        file.write(ends[1])
    return path


def parts(rows: int, size: int = 1000) -> Iterator[list[dict]]:
    """Yield the rows, alternating long and short answers, `size` at a time."""
    with gzip.open(REAL / "data" / "long_planbench_r1.jsonl.gz", "rt") as file:
        traces = [json.loads(line) for line in file]
    chunk = []
    for number in range(rows):
        trace = traces[number // 2 % len(traces)]
        thoughts, _, answer = trace["response"].removeprefix("<think>").partition("</think>")
        prompt = f"Question {number // 2}. {trace['prompt'][:400]}"
        long = f"<think>{thoughts[: LONG - len(answer) - 500]}\n</think>{answer}"
        chunk.append({"instruction": prompt, "output": f"<short>{answer.strip()}" if number % 2 else long})
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def seconds_of_copies(data: Path) -> float:
    began = time.perf_counter()
    for _ in range(2):
        copy = data.with_name("copy")
        shutil.copyfile(data, copy)
        with copy.open("r+b") as file:
            os.fsync(file.fileno())
        copy.unlink()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
