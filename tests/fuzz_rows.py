"""Fuzz dataset building and tokenization with mutated rows of every layout: python tests/fuzz_rows.py --rows 20000

Every row is written, dropped, filtered, or rejected with file, line and a reason, and the output of the other rows does
not change by a byte.
"""

import argparse
import copy
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rsft_lib import demo
from rsft_lib.data.hybrid import build_hybrid
from rsft_lib.data.store import ROWS, TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.tokenizer.patch import patch_tokenizer

WORDS = ["two ", "eggs\n", "数学", "🙂", "e\u0301", "<b>", "x<", "{{ 1 }}", "\t", "12,345", "\\boxed{4}", "'ll", "\r\n",
         "\u2028", "a\u0085b"]  # fmt: skip


# Valid rows


def text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(1, 8))).strip() or "x"


def answer(rng: random.Random) -> str:
    return rng.choice([f"<think>\n{text(rng)}\n</think>\n\n{text(rng)}", f"<short>{text(rng)}"])


def turns(rng: random.Random, number: int) -> list[dict]:
    chat = [{"role": "system", "content": text(rng)}] if rng.random() < 0.3 else []
    for turn in range(rng.choice([1, 1, 2, 3])):
        chat += [
            {"role": "user", "content": f"{number}.{turn} {text(rng)}"},
            {"role": "assistant", "content": answer(rng)},
        ]
    return chat


def messages(rng: random.Random, number: int) -> dict:
    chat = turns(rng, number)
    if rng.random() < 0.2:
        chat[-1] |= {"content": text(rng), "reasoning_content": text(rng)}
    if rng.random() < 0.3:
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": number, "b": [1, None]}}}
        chat[-1:-1] = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "3"}]
        tool = {"type": "function", "function": {"name": "add", "description": text(rng), "parameters": {"a": None}}}
        return {"messages": chat, "tools": [tool]}
    return {"messages": chat}


def sharegpt(rng: random.Random, number: int) -> dict:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    chat = [{"from": names[m["role"]], "value": m["content"]} for m in turns(rng, number) if m["role"] != "system"]
    return {"conversations": chat} | ({"system": text(rng)} if rng.random() < 0.3 else {})


def alpaca(rng: random.Random, number: int) -> dict:
    row = {"instruction": f"{number} {text(rng)}", "input": rng.choice(["", text(rng)]), "output": answer(rng)}
    row |= {"system": text(rng)} if rng.random() < 0.3 else {}
    return row | ({"history": [[text(rng), answer(rng)]]} if rng.random() < 0.3 else {})


def pair(rng: random.Random, number: int) -> dict:
    return {"id": number, "prompt": f"{number} {text(rng)}", "response": answer(rng), "source": rng.choice(["web", ""])}


LAYOUTS: list[Callable[[random.Random, int], dict]] = [messages, sharegpt, alpaca, pair]

# Invalid values


HOSTILE = [
    None, True, 0, -1, 1.5, 10**4000, float("nan"), float("inf"), "", " \n", "2024", "x" * 20_000,
    "\ud83d", "half \udc00", "\x1b[31m", "<think>", "</think>", "<short>", demo.EOS, "<｜Assistant｜>",
    "system", "tool", "user", ["user"], [["a"]], [["a", "b", "c"]], {"role": "user", "content": "x"},
    [], {}, [None], [""], [{}], {"": None}, {"a": {"b": "\ud800"}},
    {"type": "text", "text": None}, [{"type": "text", "text": {"a": 1}}],
]  # fmt: skip


def hostile(rng: random.Random):
    """A value of a wrong type, size or nesting."""
    if rng.random() < 0.95:
        return copy.deepcopy(rng.choice(HOSTILE))  # copied, since the next mutation may change it
    nested = []
    for _ in range(rng.choice([3, 300, 900])):
        nested = [nested]
    return nested


def places(value, depth: int = 0) -> list:
    """(container, key) of every value in a row, down to a nesting depth of 20 lists."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) and depth < 20 else ()
    return [place for key in keys for place in [(value, key), *places(value[key], depth + 1)]]


def mutated(row: dict, rng: random.Random) -> bytes:
    """A row with one to three values replaced, added, removed or renamed, or with corrupted bytes."""
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(row) or [(row, "")])
        kind = rng.randrange(5)
        if kind < 2:
            container[key] = hostile(rng)
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(["weight", "train", "tools", "system", "answer", "input", "\ud800", "extra"])] = (
                hostile(rng)
            )
        elif kind == 3:
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif isinstance(container, dict):
            container[str(key) + rng.choice(["s", "\u200b"])] = container.pop(key, None)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.9).encode("utf-8", "backslashreplace")
    return corrupted(line, rng) if rng.random() < 0.2 else line


def corrupted(line: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(line) + 1)
    parts = [b"\x00" * 9, b"\xff", b'"', b"{", b'"messages": 1, ', line[:place]]
    return rng.choice([line[:place], line[:place] + rng.choice(parts) + line[place:], b"  ", b""])


# Invariants


def fuzz(folder: Path, rows: int, seed: int, workers: int = 2) -> dict[str, Counter]:
    """Generate `rows` rows of each layout, check the invariants, and return the counts by layout and step."""
    patch_tokenizer(demo.make_model(folder / "model", seed=0), folder / "patched", {"<|quad_start|>": "<short>"})
    found = {}
    for layout in LAYOUTS:
        rng, place = random.Random(f"{seed} {layout.__name__}"), folder / layout.__name__
        place.mkdir()
        good = {n: json.dumps(layout(rng, n)).encode() for n in range(1, rows + 1) if rng.random() < 0.5}
        lines = [good[n] if n in good else mutated(layout(rng, n), rng) for n in range(1, rows + 1)]
        lines = [line.replace(b"\n", b" ").replace(b"\r", b" ") for line in lines]
        (place / "mixed.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        (place / "good.jsonl").write_bytes(b"".join(line + b"\n" for line in good.values()))
        (place / "good.json").write_bytes(b"[" + b",\n ".join(good.values()) + b"]")
        filled = [n for n, line in enumerate(lines, start=1) if line.strip()]
        found[f"{layout.__name__} 04"] = tokenized(place, folder / "patched", list(good), filled, workers)
        found[f"{layout.__name__} 03"] = built(place, list(good), filled)
    return found


def tokenized(place: Path, tokenizer: Path, good: list[int], filled: list[int], workers: int) -> Counter:
    options = {"max_length": 2000, "reject_limit": 1.0, "workers": workers}
    counts = tokenize(place / "mixed.jsonl", tokenizer, place / "mixed", **options)["counts"]
    tokenize(place / "good.jsonl", tokenizer, place / "good", **options)
    rejected, written = rejects(place / "mixed"), np.load(place / "mixed" / ROWS).tolist()
    assert counts["records"] == len(filled) == counts["written"] + counts["rejected"] + counts["dropped"], counts
    assert len(rejected) == counts["rejected"] and len(written) == counts["written"]
    assert set(filled) >= rejected | set(written) and not rejected & set(written)
    tokenize(place / "good.json", tokenizer, place / "list", **options)
    assert samples(place / "list") == samples(place / "good")
    ours, expected = (samples(place / name) for name in ("mixed", "good"))
    for number, sample in expected.items():
        assert ours[good[number - 1]] == sample, (
            f"row {good[number - 1]} of {place} is written differently beside mutated rows"
        )
    return Counter(counts)


def built(place: Path, good: list[int], filled: list[int]) -> Counter:
    for name in ("mixed", "good"):
        build_hybrid("", "", place / f"{name}-built", 0.0, 0, hybrid=place / f"{name}.jsonl", reject_limit=1.0)
    counts = json.loads((place / "mixed-built" / "manifest.json").read_bytes())["records"]
    ours, expected = ((place / f"{name}-built" / "train.jsonl").read_bytes().splitlines() for name in ("mixed", "good"))
    assert counts["read"] == len(filled) == counts["rejected"] + counts["disagreeing"] + len(ours), counts
    assert len(rejects(place / "mixed-built")) == counts["rejected"]
    for line in (*ours, *expected):
        json.loads(line, parse_constant=refuse_constant)
    assert not Counter(expected) - Counter(ours), "rows of a clean file are written differently beside mutated rows"
    return Counter(counts)


def refuse_constant(name: str):
    raise AssertionError(f"{name} was written, which is not JSON")


def rejects(folder: Path) -> set[int]:
    """Line numbers of the rejected rows; checks that each has a reason and its file."""
    path = folder.with_name(f"{folder.name}.rejected.jsonl")
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    assert all(row["reason"].strip() and row["file"].endswith(".jsonl") for row in rows)
    assert len({row["line"] for row in rows}) == len(rows)
    return {row["line"] for row in rows}


def samples(folder: Path) -> dict[int, tuple[bytes, bytes]]:
    store = TokenStore(folder)
    numbers = np.load(folder / ROWS).tolist()
    return {number: tuple(part.tobytes() for part in store[i]) for i, number in enumerate(numbers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="total number of rows, shared by the four layouts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, counts in fuzz(Path(folder), arguments.rows // len(LAYOUTS), arguments.seed).items():
            print(f"{name:<12}", ", ".join(f"{what} {count:,}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
