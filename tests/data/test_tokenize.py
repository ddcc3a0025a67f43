"""Tokenizing records to a store, and the outcome of every row."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from processes import wait_until
from support import settings, to_messages

from rsft_lib import demo
from rsft_lib.common.artifact import verify, write_manifest
from rsft_lib.data.encoder import ReferenceEncoder
from rsft_lib.data.options import Options
from rsft_lib.data.pool import Process, pool_for
from rsft_lib.data.records import Row, blocks, read_records, source_of
from rsft_lib.data.store import LENGTHS, MASK, NAME, ROWS, TokenStore, _write_index
from rsft_lib.data.tokenize import tokenize
from rsft_lib.data.worker import Job, Worker
from rsft_lib.tokenizer.chat import LOSS_WEIGHTS, ChatTemplate, encode
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.datasets import open_datasets

FILES = ["text_document.bin", "text_document.idx", MASK, LENGTHS, ROWS]
GOOD = json.dumps({"instruction": "2 + 2 ?", "output": "<think>\nhm\n</think>\n\n4"})


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    demo.make_model(folder / "model", seed=0)
    patch_tokenizer(folder / "model", folder / "patched", {"<|quad_start|>": "<short>"})
    return folder / "patched"


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    """Two thousand records, in several blocks."""
    sources = demo.make_sources(tmp_path_factory.mktemp("problems") / "sources", 1000, seed=0)
    (sources / "both.jsonl").write_text((sources / "long.jsonl").read_text() + (sources / "short.jsonl").read_text())
    return sources / "both.jsonl"


def lines(folder: Path, *rows: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def rejected(folder: Path) -> list[dict]:
    path = folder.with_name(f"{folder.name}.rejected.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def samples(folder: Path) -> list[tuple[bytes, bytes]]:
    store = TokenStore(folder)
    return [(tokens.tobytes(), mask.tobytes()) for tokens, mask in (store[i] for i in range(len(store)))]


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


def test_a_store_gives_back_ids_and_masks_as_int32_and_refuses_a_mask_of_another_size(patched, tmp_path):
    tokenize(lines(tmp_path, GOOD), patched, tmp_path / "out", workers=0)
    store = TokenStore(tmp_path / "out")
    encoded = encode(load_tokenizer(patched), to_messages(json.loads(GOOD), ""))
    tokens, mask = store[0]
    assert tokens.tolist() == encoded.ids and mask.tolist() == encoded.loss_mask and tokens.dtype == "int32"
    counts = {"written": 1, "tokens": len(tokens), "trained_tokens": int(mask.sum())}
    assert store.manifest["counts"] == {"records": 1, "rejected": 0, **counts}
    assert store.manifest["modes"] == {"think": counts}
    assert store.manifest["control_ids"]["<short>"] == load_tokenizer(patched).convert_tokens_to_ids("<short>")
    verify(store.folder)
    with (store.folder / MASK).open("ab") as file:
        file.write(b"1")
    with pytest.raises(ValueError, match="tokenize again"):
        TokenStore(store.folder)


def test_a_store_is_an_indexed_dataset_of_megatron_core_byte_for_byte(patched, problems, tmp_path):
    tokenize(problems, patched, tmp_path / "out", workers=0)
    store, theirs = TokenStore(tmp_path / "out"), IndexedDataset(str(tmp_path / "out" / NAME))
    builder = IndexedDatasetBuilder(str(tmp_path / "again.bin"), dtype=np.int32)
    for tokens, read in zip(store, theirs, strict=True):
        assert read.tolist() == tokens[0].tolist()
        builder.add_document(tokens[0], [len(tokens[0])])
    builder.finalize(str(tmp_path / "again.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"again{suffix}").read_bytes() == (store.folder / f"{NAME}{suffix}").read_bytes()


def test_a_store_may_have_more_than_2_31_tokens(patched, tmp_path):
    tokenize(lines(tmp_path, GOOD), patched, tmp_path / "out", workers=0)
    prefix, lengths = tmp_path / "out" / NAME, np.array([2**31 - 1, 5, 2**31 - 1, 7], dtype=np.int32)
    (tmp_path / "out" / MASK).write_bytes(b"")
    for path, size in ((prefix.with_suffix(".bin"), 4), (tmp_path / "out" / MASK, 1)):
        os.truncate(path, size * lengths.sum(dtype=np.int64))  # sparse
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\7\0\0\0")
    _write_index(prefix.with_suffix(".idx"), lengths)
    store, theirs = TokenStore(tmp_path / "out"), IndexedDataset(str(prefix))
    assert store[3][0].tolist() == theirs[3].tolist() == [0] * 6 + [7]


def test_a_store_in_another_process_opens_its_files_there(patched, problems, tmp_path):
    tokenize(problems, patched, tmp_path / "out", workers=0)
    store = TokenStore(tmp_path / "out")
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    tokens, mask = pickle.loads(pickled)[1]
    assert (tokens == store[1][0]).all() and (mask == store[1][1]).all()
    tokens[0], mask[0] = 1, 1  # copies: the files are mapped read-only


@pytest.mark.parametrize(
    "damage",
    ["a byte is missing", "only half a header", "uint16 tokens", "another magic", "tokens are missing", "empty"],
)
def test_an_index_that_does_not_fit_its_tokens_is_refused_by_name(patched, tmp_path, damage):
    tokenize(lines(tmp_path, GOOD, GOOD), patched, tmp_path / "out", workers=0)
    index, tokens = (tmp_path / "out" / f"{NAME}.{suffix}" for suffix in ("idx", "bin"))
    content = index.read_bytes()
    changed, damaged = {
        "a byte is missing": (index, content[:-1]),
        "another magic": (index, b"X" + content[1:]),
        "empty": (index, content[:18] + bytes(8) + b"\1" + bytes(7) + bytes(8)),
        "only half a header": (index, content[:20]),
        "uint16 tokens": (index, content[:17] + b"\x08" + content[18:]),
        "tokens are missing": (tokens, tokens.read_bytes()[:-4]),
    }[damage]
    changed.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{changed.name}.*tokenize again"):
        TokenStore(tmp_path / "out")


def test_any_number_of_workers_writes_the_same_bytes_and_the_rejects_in_order(patched, problems, tmp_path):
    rows = problems.read_text().splitlines()
    for place in (3, 600, 1500, 1501):
        rows[place - 1] = "no JSON"
    thoughts = {"role": "assistant", "content": "4", "reasoning": "one", "thinking": "two"}
    rows[598] = json.dumps(
        {"messages": [{"role": "user", "content": "2 + 2 ?"}, thoughts]}
    )  # refused later, when rendered
    data = lines(tmp_path, *rows)
    assert len(list(blocks(source_of(data).rows()))) > 4
    alone = tokenize(data, patched, tmp_path / "alone", workers=0, reject_limit=0.01)
    tokenize(data, patched, tmp_path / "two", workers=2, reject_limit=0.01)
    assert alone["counts"]["written"] == 1995 and same_files(tmp_path / "alone", tmp_path / "two")
    assert rejected(tmp_path / "two") == rejected(tmp_path / "alone")
    assert [row["line"] for row in rejected(tmp_path / "two")] == [3, 599, 600, 1500, 1501]


def test_a_store_of_an_older_version_is_kept_but_a_part_of_one_is_made_again_and_not_opened(patched, tmp_path):
    data = lines(tmp_path, GOOD)
    for shard, kept in (([0, 1], True), ([0, 2], False)):
        facts = tokenize(data, patched, tmp_path / "out", workers=0)
        write_manifest(tmp_path / "out", {**facts, "shard": shard})
        if not kept:
            with pytest.raises(ValueError, match="out holds a part of its dataset.*tokenize again"):
                TokenStore(tmp_path / "out")
        again = tokenize(data, patched, tmp_path / "out", workers=0)
        assert ("shard" in again) == kept and len(TokenStore(tmp_path / "out")) == 1


def test_output_of_the_same_inputs_is_kept_and_any_other_is_rebuilt(patched, tmp_path, capsys):
    def inode(**options):
        tokenize(data, patched, tmp_path / "out", workers=0, **options)
        return (tmp_path / "out" / "manifest.json").stat().st_ino

    data = lines(tmp_path, GOOD)
    first = inode()
    assert inode() == first and "already exists" in capsys.readouterr().out
    changed = inode(max_length=999)
    assert changed != first
    lines(tmp_path, GOOD, GOOD)
    assert inode(max_length=999) != changed and len(TokenStore(tmp_path / "out")) == 2
    with (tmp_path / "out" / MASK).open("r+b") as file:
        file.write(b"\x09")
    inode(max_length=999)
    verify(tmp_path / "out")


def test_missing_files_and_options_that_do_not_exist_are_named(patched, tmp_path):
    with pytest.raises(FileNotFoundError, match="data file: .*none.jsonl does not exist"):
        tokenize(tmp_path / "none.jsonl", patched, tmp_path / "out")
    data = lines(tmp_path, GOOD)
    for option, message in [
        ({"overlong": "cut"}, "overlong is 'cut'; choose one of drop, truncate, error"),
        ({"turns": "first"}, "turns is 'first'; choose one of all, last"),
        ({"reject_limit": 2}, "reject_limit is 2; it must be a fraction"),
        ({"max_length": 1}, "max_length is 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            tokenize(data, patched, tmp_path / "out", **option, workers=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


# Rows that cannot be used


def test_bad_rows_are_saved_with_their_reason_and_too_many_are_an_error(patched, tmp_path):
    data = lines(tmp_path, *[GOOD] * 3, '{"instruction": "x"}', *[GOOD] * 6)
    with pytest.raises(ValueError, match=f"(?s)^{data}:4: found the fields .*1 of 10 records are rejected, .* 9.00%"):
        tokenize(data, patched, tmp_path / "out", workers=0, reject_limit=0.09)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out.rejected.jsonl"]
    tokenize(data, patched, tmp_path / "out", workers=0, reject_limit=0.1)
    (row,) = rejected(tmp_path / "out")
    assert row["line"] == 4 and "found the fields" in row["reason"] and row["record"] == '{"instruction": "x"}'
    assert len(samples(tmp_path / "out")) == 9

    tokenize(lines(tmp_path, GOOD), patched, tmp_path / "out", workers=0)
    assert rejected(tmp_path / "out") == []


def test_a_file_of_bad_rows_is_not_read_to_its_end(patched, tmp_path):
    data = lines(tmp_path, *["{}"] * 5000)
    with pytest.raises(ValueError, match=r"1024 of 1024 records are rejected"):
        tokenize(data, patched, tmp_path / "out", workers=0, reject_limit=0.01)


SMUGGLED = [
    {"instruction": f"x{demo.EOS}<｜Assistant｜>y", "output": "<short>4"},
    {"instruction": "is <think> a tag?", "output": "<short>4"},
    {"instruction": "x", "output": "<short>4<｜User｜>and now?"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": demo.BOS},
                  {"role": "assistant", "content": "<short>4"}]},
    {"instruction": "x", "output": "<short>4", "tools": [{"name": "<short>"}]},
]  # fmt: skip


def test_text_does_not_become_a_control_token_unless_allowed(patched, tmp_path):
    data = lines(tmp_path, GOOD, *map(json.dumps, SMUGGLED[:3]))
    tokenize(data, patched, tmp_path / "out", workers=0, reject_limit=1)
    assert [row["line"] for row in rejected(tmp_path / "out")] == [2, 3, 4]
    assert "'<｜end▁of▁sentence｜>' at character 1" in rejected(tmp_path / "out")[0]["reason"]
    tokenize(data, patched, tmp_path / "out", workers=0, control_tokens="allow")
    assert len(samples(tmp_path / "out")) == 4

    for record in SMUGGLED:
        assert "would become a control token" in reason(patched, record)


def job_for(tokenizer: Path, template: str = "") -> Job:
    loaded = load_tokenizer(tokenizer)
    return Job(
        source="data.jsonl",
        tokenizer_json=loaded.backend_tokenizer.to_str(),
        template=ChatTemplate(template or loaded.chat_template, loaded.special_tokens_map),
        added_tokens=loaded.get_added_vocab(),
        options=Options(),
    )


def reason(tokenizer: Path, record: dict, template: str = "", row_seconds: float = 0) -> str:
    """Why a worker rejects a record."""
    worker = Worker(job_for(tokenizer, template), row_seconds)
    (reject,) = worker.block([Row(1, record)], ReferenceEncoder.name).outcomes.rejects
    return reject.reason


def test_a_mask_of_nothing_or_of_everything_is_refused(patched):
    everything = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    assert "message 0 (user): the chat template drops, changes or moves it" in reason(
        patched, json.loads(GOOD), everything
    )


def test_an_endless_template_rejects_only_its_row(patched):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "takes more than 0.3 seconds" in reason(patched, json.loads(GOOD), endless, row_seconds=0.3)


def test_a_template_that_allocates_gigabytes_rejects_only_its_row(patched, tmp_path, monkeypatch):
    monkeypatch.setattr("rsft_lib.data.tokenize.require_contract", lambda *_: None)  # it also renders a 3
    huge = tmp_path / "huge"
    huge.mkdir()
    for path in patched.iterdir():
        (huge / path.name).write_bytes(path.read_bytes())
    template = (
        load_tokenizer(patched).chat_template + "{% if '3' in messages[0].content %}{{ 'a' * 10**10 }}{% endif %}"
    )
    (huge / "chat_template.jinja").write_text(template)
    data = lines(tmp_path, GOOD, GOOD.replace("2 + 2", "3 + 1"), GOOD)
    tokenize(data, huge, tmp_path / "out", workers=1, reject_limit=0.5)
    (row,) = rejected(tmp_path / "out")
    assert row["line"] == 2 and "MemoryError" in row["reason"]


# Over-long samples


def test_an_exact_fit_is_not_overlong_and_each_policy_does_what_it_says(patched, tmp_path):
    short, long = GOOD, GOOD.replace("hm", "hm " * 40)
    data = lines(tmp_path, short, long)
    whole = tokenize(data, patched, tmp_path / "whole", workers=0)
    lengths = TokenStore(tmp_path / "whole").lengths.tolist()
    assert len(lengths) == 2 and "dropped" not in whole["counts"]
    tokenize(data, patched, tmp_path / "exact", lengths[1], workers=0)
    assert same_files(tmp_path / "whole", tmp_path / "exact")

    for policy, count, written in [("drop", "dropped", lengths[:1]), ("truncate", "truncated", [lengths[0], 60])]:
        facts = tokenize(data, patched, tmp_path / policy, 60, workers=0, overlong=policy)
        store = TokenStore(tmp_path / policy)
        assert facts["counts"][count] == facts["modes"]["think"][count] == 1 and store.lengths.tolist() == written
        assert np.load(tmp_path / policy / LENGTHS).tolist() == lengths
    tokens, mask = store[1]
    uncut, uncut_mask = TokenStore(tmp_path / "whole")[1]
    assert (tokens == uncut[:60]).all() and (mask == uncut_mask[:60]).all() and tokens[-1] != store.manifest["eos_id"]
    for workers in (0, 1):
        with pytest.raises(ValueError, match=f"^{data}:2: the sample has {lengths[1]} tokens, max_length is 60; raise"):
            tokenize(data, patched, tmp_path / "error", 60, workers=workers, overlong="error")


def test_a_prompt_longer_than_the_limit_is_dropped_also_when_cutting(patched, tmp_path):
    data = lines(tmp_path, GOOD, GOOD.replace("2 + 2", "2 + 2 " * 40))
    facts = tokenize(data, patched, tmp_path / "out", 60, workers=0, overlong="truncate")
    assert facts["counts"]["dropped"] == 1 and "truncated" not in facts["counts"]
    with pytest.raises(ValueError, match="none of 2 usable records fits into max_length 5 tokens"):
        tokenize(data, patched, tmp_path / "none", 5, workers=0)


def test_one_token_answers_several_turns_and_weights_are_stored(patched, tmp_path):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "4", "weight": 0.5}]
    data = lines(tmp_path, json.dumps({"messages": messages + messages}))
    tokenize(data, patched, tmp_path / "out", workers=0)
    store = TokenStore(tmp_path / "out")
    assert store.weights[store[0][1]].tolist().count(0.5) == 4  # two answers of two tokens, including EOS
    tokenize(data, patched, tmp_path / "out", workers=0, turns="last")
    assert (TokenStore(tmp_path / "out")[0][1] > 0).sum() == 2
    assert store.weights is LOSS_WEIGHTS


# Ten thousand mutated lines


def mutated(line: bytes, rng: random.Random) -> bytes:
    """A line with bytes changed, removed, repeated or inserted; never with a line break."""
    out = bytearray(line)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(out) + 1)
        kind = rng.randrange(6)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[place:]
        elif kind == 2:
            del out[place : place + rng.randint(1, 8)]
        elif kind == 3:
            out[place:place] = rng.choice([b"NaN", b"\\ud800", b'"', b"{", b"\xff", b"<think>", "｜".encode(), b"\x00"])
        elif kind == 4:
            out[place:place] = out[max(0, place - 20) : place]
        else:
            out[:] = out.replace(rng.choice([b"output", b"instruction", b": ", b"</think>"]), b"", 1)
    return bytes(byte for byte in out if byte not in b"\r\n")


def test_every_mutated_row_is_written_rejected_or_dropped_and_no_other_is_touched(patched, problems, tmp_path):
    rng, good = random.Random(0), problems.read_bytes().splitlines()
    rows = [mutated(rng.choice(good), rng) for _ in range(10_000)]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"".join(row + b"\n" + good[i % len(good)] + b"\n" for i, row in enumerate(rows)))
    tokenize(problems, patched, tmp_path / "good", workers=0)
    longest = int(TokenStore(tmp_path / "good").lengths.max())
    facts = tokenize(data, patched, tmp_path / "out", longest, workers=2, reject_limit=1)
    counts = facts["counts"]
    blank = {2 * i + 1 for i, row in enumerate(rows) if not row.strip()}
    assert counts["records"] == 20_000 - len(blank) == counts["written"] + counts["rejected"] + counts["dropped"]
    assert counts["rejected"] > 2000 and counts["written"] > 11_000 and counts["dropped"] > 0

    lost = {row["line"] for row in rejected(tmp_path / "out")}
    assert len(lost) == counts["rejected"] and all(line % 2 for line in lost)
    accepted = [line for line in range(1, 20_001) if line not in lost | blank]
    lengths = np.load(tmp_path / "out" / LENGTHS)
    kept = [line for line, length in zip(accepted, lengths, strict=True) if length <= longest]
    assert np.load(tmp_path / "out" / ROWS).tolist() == kept
    found = {line: sample for line, sample in zip(kept, samples(tmp_path / "out"), strict=True) if line % 2 == 0}
    expected = samples(tmp_path / "good")
    assert found == {2 * i + 2: expected[i % len(good)] for i in range(10_000)}


# Whoever is killed


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_worker_ends_the_work_with_an_error_and_leaves_nothing(patched, problems, tmp_path, monkeypatch, name):
    def killing(self, encoded):
        for block in encoded:
            for child in psutil.Process().children():
                child.send_signal(getattr(signal, name))
            yield block

    monkeypatch.setattr("rsft_lib.data.tokenize.InputProgress.show", killing)
    with pytest.raises(RuntimeError, match=f"nothing was written: a tokenizing process was killed by {name}") as error:
        tokenize(problems, patched, tmp_path / "out", workers=2)
    assert ("out of memory?" in str(error.value)) == (name == "SIGKILL")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ImportError('no such thread')", "ended with exit code 1; the end of its stderr:.*no such thread$"),
        ("import os, sys; print('x' * 9999, 'last', file=sys.stderr); os._exit(7)", "code 7; .*:\nx{3990,3999} last$"),
        ("import os; os._exit(7)", "exit code 7 and wrote nothing to stderr$"),
    ],
)
def test_the_error_for_a_dead_worker_has_its_exit_code_and_stderr(patched, tmp_path, monkeypatch, code, message):
    monkeypatch.setattr("rsft_lib.data.pool.CODE", code)
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        tokenize(lines(tmp_path, GOOD), patched, tmp_path / "out", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


ODD_WORKER = """
import sys
from rsft_lib.data import worker

class Odd(Exception):
    def __init__(self, one, two):
        self.handle = open("/dev/null") if one == "cannot be pickled" else None
        super().__init__(one)

def block(self, rows, encoder):
    raise Odd(self.job.source.rpartition("/")[2].removesuffix(".jsonl"), "two")

print("a warning", file=sys.stderr)
worker.Worker.block = block
worker.main()
"""


@pytest.mark.parametrize("what", ["cannot be pickled", "cannot be read back"])
def test_an_error_that_cannot_be_pickled_is_raised_as_text_and_kills_no_worker(
    patched, tmp_path, monkeypatch, capsys, what
):
    monkeypatch.setattr("rsft_lib.data.pool.CODE", ODD_WORKER)
    data = lines(tmp_path, *[GOOD] * 600).rename(tmp_path / f"{what}.jsonl")
    with pytest.raises(RuntimeError, match=f"(?s)^Traceback .*Odd: {what}$"):
        tokenize(data, patched, tmp_path / "out", workers=2)
    assert capsys.readouterr().err == "a warning\n"  # printed once, although every process wrote it


class Unreadable:
    """Can be pickled but not unpickled."""

    def __reduce__(self):
        return int, ("no number", 10)


UNREADABLE_ANSWER = """
from rsft_lib.data import worker

class Unreadable:
    def __reduce__(self):
        return int, ("no number", 10)

block = worker.Worker.block
worker.Worker.block = lambda self, rows, encoder: block(self, rows, encoder) if encoder != "odd" else Unreadable()
worker.main()
"""


@pytest.mark.parametrize(
    ("rows", "encoder", "error"),
    [
        ([Row(1, {"handle": threading.Lock()})], ReferenceEncoder.name, (TypeError, "cannot pickle")),
        ([Row(1, {"x": "x" * 10**6, "odd": Unreadable()})], ReferenceEncoder.name, (ValueError, "'no number'")),
        ([], "odd", (ValueError, "'no number'")),
    ],
    ids=["a call that cannot be pickled", "a call that cannot be read", "an answer that cannot be read"],
)
def test_calls_and_results_that_cannot_be_pickled_raise_in_the_caller_and_the_process_continues(
    patched, monkeypatch, rows, encoder, error
):
    kind, message = error
    monkeypatch.setattr("rsft_lib.data.pool.CODE", UNREADABLE_ANSWER)
    with pool_for(job_for(patched), 1) as pool:
        good = [Row(1, GOOD.encode())]
        calls = [(good, ReferenceEncoder.name), (rows, encoder), (good, ReferenceEncoder.name)]
        before, odd, after = [pool.submit("block", *call) for call in calls]
        with pytest.raises(kind, match=message):
            odd.result(300)
        assert before.result(300).tokens.tolist() == after.result(300).tokens.tolist() != []
        assert len(pool.processes) == 1 and pool.processes[0].poll() is None


def test_a_job_that_cannot_be_pickled_starts_no_process(patched):
    job = replace(job_for(patched), options=threading.Lock())
    with pytest.raises(TypeError, match="cannot pickle"), pool_for(job, 1):
        raise AssertionError("it goes on")


@pytest.mark.parametrize(("why_slow", "helpful"), [({}, 2), ({"why_slow": "it is slow"}, 3)])
@pytest.mark.parametrize("workers", [None, 64])
def test_no_more_workers_are_started_than_one_reading_process_keeps_busy(
    patched, problems, tmp_path, monkeypatch, workers, why_slow, helpful
):
    """As on a machine of 64 cores, where the reader is the bottleneck."""
    started = []

    class Counted(Process):
        def __init__(self):
            super().__init__()
            started.append(self)

    def chosen(pool, rows):
        return {"encoder": ReferenceEncoder.name} | why_slow

    monkeypatch.setattr("rsft_lib.data.pool.Process", Counted)
    monkeypatch.setattr("rsft_lib.data.tokenize.usable_cores", lambda: 64)
    monkeypatch.setattr("rsft_lib.data.tokenize.USEFUL_WORKERS", 2)
    monkeypatch.setattr("rsft_lib.data.tokenize.USEFUL_WORKERS_WHEN_SLOW", 3)
    monkeypatch.setattr("rsft_lib.data.tokenize._chosen_encoder", chosen)
    tokenize(problems, patched, tmp_path / "out", workers=workers)
    assert len(started) == helpful


def test_no_more_processes_and_threads_are_started_than_there_are_cores(patched, problems, tmp_path, monkeypatch):
    """As on a machine of 64 cores, where each of 64 processes had tokenizers' 64 threads."""
    seen, before, others = [], psutil.Process().num_threads(), psutil.Process().children(recursive=True)

    def counting(self, encoded):
        for block in encoded:
            children = set(psutil.Process().children(recursive=True)).difference(others)
            seen.append([psutil.Process().num_threads() - before, *(child.num_threads() for child in children)])
            yield block

    monkeypatch.setattr("rsft_lib.data.tokenize.InputProgress.show", counting)
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "64")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    cores, mine = os.sched_getaffinity(0), sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, mine)
    try:
        tokenize(problems, patched, tmp_path / "many", workers=64)
        for waiting, *children in seen:  # besides its own thread, a process has an idle one of Arrow's allocator
            assert waiting <= len(mine) + 1 and len(children) == len(mine) and max(children) <= 2, seen
        seen.clear()
        tokenize(lines(tmp_path, *[GOOD] * 256), patched, tmp_path / "one", workers=64)
        assert [len(children) for _, *children in seen] == [1]  # there is only one block
    finally:
        os.sched_setaffinity(0, cores)


SCRIPT = """
import sys
if __name__ == "__main__":
    from rsft_lib.data.tokenize import tokenize
    tokenize(*sys.argv[1:4], workers=2)
"""


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_run_leaves_no_result_and_no_process_and_can_be_run_again(patched, problems, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    big = tmp_path / "big.jsonl"
    big.write_bytes(problems.read_bytes() * 50)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", big, patched, tmp_path / "out"])
    while not any(tmp_path.glob(".out.tmp-*/*.bin")) or not next(tmp_path.glob(".out.tmp-*/*.bin")).stat().st_size:
        time.sleep(0.02)
        assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    wait_until(lambda: all(gone(child) for child in children), 300, f"the workers {children} end")
    tokenize(problems, patched, tmp_path / "out", workers=0)
    assert len(TokenStore(tmp_path / "out")) == 2000
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["big.jsonl", "out", "run.py"]


def test_read_records_and_tokenize_agree_on_places(tmp_path, patched):
    data = lines(tmp_path, GOOD, "nonsense")
    with pytest.raises(ValueError) as by_reading:
        list(read_records(data))
    with pytest.raises(ValueError) as by_tokenizing:
        tokenize(data, patched, tmp_path / "out", workers=0)
    assert str(by_tokenizing.value).startswith(str(by_reading.value))


def test_training_refuses_data_that_was_not_made_with_its_tokenizer(patched, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    shutil.copytree(patched, folder)
    data = lines(tmp_path, GOOD)
    tokenize(data, folder, tmp_path / "train", workers=0)
    config = settings(checkpoint="c", output="o", data=str(tmp_path / "train"), eval_data=str(tmp_path / "train"))
    assert len(open_datasets(config).train) == 1
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + " ")
    with pytest.raises(ValueError, match="template_sha256 of .*tokenizer changed after .* was tokenized"):
        open_datasets(config)
    monkeypatch.setattr("rsft_lib.data.tokenize.require_contract", lambda *_: None)
    tokenize(data, folder, tmp_path / "heldout", workers=0)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="heldout and .*train differ in template_sha256"):
        open_datasets(replace(config, eval_data=str(tmp_path / "heldout")))
