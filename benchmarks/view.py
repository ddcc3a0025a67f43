"""Time of the displays: python benchmarks/view.py

Prints
- the mask view of a sample of 30,000 tokens, compared with a view that decodes and marks every token separately;
- the statistics of a store, compared with the floor, a sum over the same files;
- the plots and tables of a million samples.

With RSFT_REAL_DATA the tokenizer, texts and lengths are real, otherwise those of the demo.
"""

import html
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rsft_lib import demo
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.conversation import conversation
from rsft_lib.data.packing import pack
from rsft_lib.data.records import read_records
from rsft_lib.data.store import MASK, NAME, StoreWriter, TokenStore
from rsft_lib.display.data.length_costs import layout_costs, overlong_costs
from rsft_lib.display.data.lengths import plot_lengths
from rsft_lib.display.data.sample_stats import Samples, measure
from rsft_lib.display.mask.sample import show_mask
from rsft_lib.tokenizer.chat import encode
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

REAL = os.environ.get("RSFT_REAL_DATA")
TOKENS, SAMPLES = 30_000, 1_000_000


def seconds(work: Callable, repeats: int = 5):
    """(minimum time of `repeats` calls in seconds, result)."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return min(times), result


def inputs(folder: Path) -> tuple[object, list[list[dict]]]:
    """A patched tokenizer and conversations."""
    if REAL:
        source = Path(REAL) / "tokenizers" / "r1-distill-qwen"
        files = [Path(REAL) / "data" / name for name in ("long_planbench_r1.jsonl.gz", "short_gsm8k_train.jsonl")]
    else:
        source, sources = demo.make_model(folder / "model", seed=0), demo.make_sources(folder / "data", 2000, seed=0)
        files = [sources / "long.jsonl", sources / "short.jsonl"]
    patch_tokenizer(source, folder / "tokenizer", {"<|quad_start|>": "<short>"})
    chats = [conversation(record).messages for file in files for _, record in read_records(file)]
    for chat in chats:
        if not chat[-1]["content"].startswith("<"):
            chat[-1]["content"] = "<short>" + chat[-1]["content"]
    return load_tokenizer(folder / "tokenizer"), chats


def token_by_token(ids: list[int], mask: list[int], tokenizer) -> str:
    """A simple mask view: every token decoded and marked separately."""
    colours = ("background:#f4f4f4;color:#474747", "background:#e3eff9;color:#08304f")
    return "".join(
        f"<span title='{token}' style='{colours[bool(trained)]}'>{html.escape(tokenizer.decode([token]))}</span>"
        for token, trained in zip(ids, mask, strict=True)
    )


def compare_views(tokenizer, chats: list[list[dict]]) -> None:
    thoughts = "".join(chat[-1]["content"].partition("</think>")[0].removeprefix("<think>") for chat in chats[:60])
    ids = tokenizer(thoughts, add_special_tokens=False)["input_ids"][: TOKENS - 100]
    answer = f"<think>{tokenizer.decode(ids)}</think>\n\nfour"
    encoded = encode(tokenizer, [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}])
    ours, view = seconds(lambda: show_mask(encoded.ids, encoded.loss_mask, tokenizer)._repr_html_())
    theirs, other = seconds(lambda: token_by_token(encoded.ids, encoded.loss_mask, tokenizer), 2)
    text = len(answer.encode())
    print(f"mask view of {len(encoded.ids):,} tokens, {text / 1e3:.0f} KB of text")
    print(f"  in runs           {ours * 1e3:7.1f} ms {len(view.encode()) / 1e3:8.0f} KB")
    size = len(other.encode()) / 1e3
    print(f"  token by token    {theirs * 1e3:7.1f} ms {size:8.0f} KB   {theirs / ours:.0f} x the time")


def compare_reading(folder: Path, tokenizer, chats: list[list[dict]]) -> Samples:
    encoded = [encode(tokenizer, chat) for chat in chats[:2000]]
    repeats = max(1, 50_000_000 // sum(len(e.ids) for e in encoded))
    with new_folder(folder, {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        for _ in range(repeats):
            for e in encoded:
                writer.add(e.ids, e.loss_mask)
        writer.close()
    store = TokenStore(folder)
    tokens = int(store.ends[-1])
    took, samples = seconds(lambda: measure(store, tokenizer), 3)
    files = (np.memmap(folder / f"{NAME}.bin", np.int32, "r"), np.memmap(folder / MASK, np.uint8, "r"))
    floor, _ = seconds(lambda: [int(file.sum(dtype=np.int64)) for file in files], 3)
    print(f"columns of {len(store):,} samples, {tokens:,} tokens")
    speed = tokens / took / 1e6
    print(f"  measure           {took * 1e3:7.0f} ms {speed:8.0f} M tokens/s   {took / floor:.1f} x the floor")
    print(f"  floor, two sums   {floor * 1e3:7.0f} ms {tokens / floor / 1e6:8.0f} M tokens/s")
    return samples


def time_a_million(samples: Samples) -> None:
    chosen = np.random.default_rng(0).integers(0, len(samples), SAMPLES)
    columns = (samples.lengths, samples.trained, samples.first, samples.closed, samples.ended, samples.modes)
    million = Samples(*(column[chosen] for column in columns), samples.dropped)
    seq_length = max(16_384, int(million.lengths.max()))
    print(f"{SAMPLES:,} samples at seq_length {seq_length:,}")
    for name, work in {
        "pack (part of two)": lambda: pack(million.lengths - 1, seq_length),
        "plot_lengths": lambda: plot_lengths(million, seq_length),
        "layout_costs": lambda: layout_costs(million.lengths, seq_length),
        "overlong_costs": lambda: overlong_costs(million),
    }.items():
        print(f"  {name:<18}{seconds(work, 1)[0]:7.2f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        tokenizer, chats = inputs(Path(place))
        compare_views(tokenizer, chats)
        time_a_million(compare_reading(Path(place) / "store", tokenizer, chats))
