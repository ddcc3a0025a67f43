"""Speed of tokenization (records on disk to token store on disk) against the bare tokenizer, and of packing.

    RSFT_REAL_DATA=FOLDER python benchmarks/tokenize_data.py [--copies 10] [--peer 'COMMAND {input} {output}']

FOLDER contains `tokenizers/r1-distill-qwen`, `data/long_planbench_r1.jsonl.gz` and `data/short_gsm8k_train.jsonl`. All
figures are from one run on all cores. Bytes are those of the rendered texts, for both sides.

bare      `tokenizers.Tokenizer.encode_batch` on the rendered texts in memory: no reading, rendering, mask or writing
start-up  `tokenize` on a file of one record: the fixed cost (tokenizer, contract, proof, processes)
whole     `tokenize` on the file: start-up, reading, checking, rendering, encoding, mask, writing, hashing, flushing
net       whole without start-up
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from tokenizers import Tokenizer

from rsft_lib.data.conversation import conversation
from rsft_lib.data.packing import pack
from rsft_lib.data.records import parse, read_rows
from rsft_lib.data.store import LENGTHS
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.chat import ChatTemplate, trained_texts
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

REAL = Path(os.environ["RSFT_REAL_DATA"])
SEQ_LENGTH = 16384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=10, help="copies of the data in the larger file")
    parser.add_argument("--workers", type=int, nargs="*", help="only this: numbers of processes for the larger file")
    parser.add_argument("--peer", default="", help="another command to time on the same file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        patch_tokenizer(REAL / "tokenizers" / "r1-distill-qwen", folder / "tok", {"<|quad_start|>": "<short>"})
        write_data(folder, arguments.copies)
        if arguments.workers:
            scaling(folder, arguments.workers)
            return
        rendered, bare = bare_speed(folder)
        print(f"bare encode_batch       {rendered / bare / 1e6:8.1f} MB/s   ({rendered / 1e6:.1f} MB of text)")
        start, _ = timed(folder, "one")
        print(f"start-up                {start:8.2f} s")
        lengths = compare(folder, rendered, bare, start, arguments.copies)
        if arguments.peer:
            peer(arguments.peer, folder)
        packing(lengths)


def write_data(folder: Path, copies: int) -> None:
    """Write `one.jsonl`, `1x.jsonl` with every record, and `nx.jsonl`: shuffled copies with distinct prompts."""
    rows = gzip.open(REAL / "data" / "long_planbench_r1.jsonl.gz").read().splitlines()
    rows += (REAL / "data" / "short_gsm8k_train.jsonl").read_bytes().splitlines()
    rng = random.Random(0)
    rng.shuffle(rows)
    (folder / "one.jsonl").write_bytes(rows[0] + b"\n")
    (folder / "1x.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    with (folder / "nx.jsonl").open("wb") as file:
        for copy in range(copies):
            for row in rng.sample(rows, len(rows)):
                record = json.loads(row)
                record["prompt"] = f"Question {copy}-{rng.randrange(10**6)}. {record['prompt']}"
                file.write(json.dumps(record).encode() + b"\n")


def bare_speed(folder: Path) -> tuple[int, float]:
    """Bytes of the rendered texts, and the bare tokenizer's time for them in seconds, the minimum of two runs."""
    loaded = load_tokenizer(folder / "tok")
    template = ChatTemplate.of(loaded)
    rows = read_rows(folder / "1x.jsonl")
    chats = [conversation(parse(row.content)).messages for row in rows]
    texts = [text for text, _ in trained_texts(template, chats)]
    bare, seconds = Tokenizer.from_str(loaded.backend_tokenizer.to_str()), []
    for _ in range(2):
        began = time.perf_counter()
        bare.encode_batch(texts, add_special_tokens=False)
        seconds.append(time.perf_counter() - began)
    return sum(len(text.encode()) for text in texts), min(seconds)


def run(source: Path, tokenizer: Path, out: Path, seconds, workers: int | None) -> None:
    began = time.perf_counter()
    tokenize(source, tokenizer, out, SEQ_LENGTH, workers=workers)
    seconds.value = time.perf_counter() - began


def scaling(folder: Path, counts: list[int]) -> None:
    """Time by number of processes, and the speed of each without start-up over that with the first number."""
    first = None
    for count in counts:
        start, whole = (timed(folder, name, count)[0] for name in ("one", "nx"))
        work = (whole - start) * count
        first = first or work
        print(
            f"{count:3} workers: start-up {start:.2f} s, whole {whole:.2f} s, efficiency {first / work:.2f}", flush=True
        )


def timed(folder: Path, name: str, workers: int | None = None) -> tuple[float, dict[str, float]]:
    """Seconds of `tokenize` without imports, and the peak memory of each kind of process, in MB."""
    context = multiprocessing.get_context("spawn")
    seconds = context.Value("d")
    source, out = folder / f"{name}.jsonl", folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    process = context.Process(target=run, args=(source, folder / "tok", out, seconds, workers))
    peaks = {"reader": 0.0, "worker": 0.0}
    watch = threading.Thread(target=watched, args=(process, peaks))
    process.start()
    watch.start()
    process.join()
    watch.join()
    if process.exitcode:
        sys.exit(f"tokenize failed on {source}")
    return seconds.value, peaks


def watched(process, peaks: dict[str, float]) -> None:
    reader = psutil.Process(process.pid)
    while process.exitcode is None:
        for child in [reader, *children(reader)]:
            kind = "reader" if child == reader else "worker"
            try:
                peaks[kind] = max(peaks[kind], child.memory_info().rss / 1e6)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.02)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def compare(folder: Path, rendered: int, bare: float, start: float, copies: int) -> np.ndarray:
    print("                           whole      net   whole/bare   net/bare   reader   a worker  (peak memory)")
    for name, times in (("1x", 1), ("nx", copies)):
        seconds, peaks = min((timed(folder, name) for _ in range(2)), key=lambda result: result[0])
        size, limit = rendered * times / 1e6, rendered / bare / 1e6
        whole, net = size / seconds, size / (seconds - start)
        print(
            f"{times:>3} x {rendered / 1e6:5.1f} MB           {whole:6.1f}   {net:6.1f} MB/s {whole / limit:7.1f} x "
            f"{net / limit:8.1f} x {peaks['reader']:7.0f} {peaks['worker']:9.0f} MB"
        )
    out = folder / "out-1x"
    counts = json.loads((out / "manifest.json").read_text())["counts"]
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"on disk                 {size / counts['tokens']:8.2f} bytes per token: 4 for its id, 1 for the mask")
    return np.load(out / LENGTHS)


def peer(command: str, folder: Path) -> None:
    """Time another tool on the same records (`instruction`, `output`): whole processes, and without start-up."""
    seconds = {}
    for name in ("one", "1x"):
        rows = (json.loads(line) for line in (folder / f"{name}.jsonl").open())
        pairs = [{"instruction": row["prompt"], "output": row["response"]} for row in rows]
        (folder / "peer.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "peer.json").write_text(json.dumps(pairs))
        script = folder / "ours.py"
        script.write_text("from rsft_lib.data.tokenize import tokenize; import sys; tokenize(*sys.argv[1:])\n")
        ours = [sys.executable, str(script), str(folder / "peer.jsonl"), str(folder / "tok"), str(folder / "ours-out")]
        theirs = shlex.split(command.format(input=folder / "peer.json", output=folder / "peer-out"))
        shutil.rmtree(folder / "ours-out", ignore_errors=True)
        seconds[name] = np.array([duration(ours), duration(theirs)])
    for kind, (mine, other) in {"whole": seconds["1x"], "net": seconds["1x"] - seconds["one"]}.items():
        print(f"peer, {kind:<5}             ours {mine:.1f} s, theirs {other:.1f} s: {other / mine:.1f} x")


def duration(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def packing(lengths: np.ndarray) -> None:
    fitting = lengths[lengths <= SEQ_LENGTH]
    positions = np.random.default_rng(0).choice(fitting, 1_000_000) - 1
    before = psutil.Process().memory_info().rss
    peak, done = [before], threading.Event()
    watch = threading.Thread(
        target=lambda: [peak.append(psutil.Process().memory_info().rss) for _ in iter(lambda: done.wait(0.02), True)]
    )  # noqa: E501
    watch.start()
    began = time.perf_counter()
    packs = pack(positions, SEQ_LENGTH)
    seconds = time.perf_counter() - began
    done.set()
    watch.join()
    fill = positions.sum() / (len(packs) * SEQ_LENGTH)
    least = -(-int(positions.sum()) // SEQ_LENGTH)
    print(
        f"packing 1,000,000       {fill:8.2%} full in {seconds:.2f} s with {(max(peak) - before) / 1e6:,.0f} MB; "
        f"{len(packs):,} packs, lower bound {least:,}"
    )


if __name__ == "__main__":
    main()
