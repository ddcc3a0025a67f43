"""A scratch file of samples, for random access, with a numeric row for each."""

import json
import os
from collections.abc import Callable, Iterable
from itertools import islice
from typing import BinaryIO

import numpy as np

from rsft_lib.common.progress import progress
from rsft_lib.data.answers import final_answer
from rsft_lib.data.pairs import ROW
from rsft_lib.data.records import Source
from rsft_lib.data.samples import Sample

BATCH = 128  # samples measured at a time; encodings take about 100 bytes per token


class Scratch:
    """Samples written to a file one after the other and read in any order; `rows` describes them (`pairs.ROW`)."""

    def __init__(self, file: BinaryIO, sources: list[Source]):
        self.file, self.sources, self.rows = file, sources, np.zeros(0, ROW)

    def fill(self, samples: Iterable[Sample], measure: Callable[[list[str]], list[int]]) -> None:
        samples, blocks = iter(samples), []
        with progress("read", " samples") as bar:
            while batch := list(islice(samples, BATCH)):
                blocks.append(self._write(batch, measure))
                bar.update(len(batch))
        self.file.flush()
        self.rows = np.concatenate([self.rows, *blocks])

    def _write(self, batch: list[Sample], measure: Callable[[list[str]], list[int]]) -> np.ndarray:
        block = np.zeros(len(batch), ROW)
        for name in batch[0].facts:
            block[name] = [sample.facts[name] for sample in batch]
        block["prompt"] = measure([sample.context for sample in batch])
        block["answer"] = measure([sample.record["output"] for sample in batch])
        block["size"] = [len(sample.line) for sample in batch]
        block["offset"] = self.file.tell() + np.cumsum(block["size"], dtype=np.int64) - block["size"]
        self.file.writelines(sample.line for sample in batch)
        return block

    def line(self, number: int) -> bytes:
        line = self._stored(number)
        return line[:-2] + b', "mode_given": true}\n' if self.rows["given"][number] else line

    def record(self, number: int) -> dict:
        return json.loads(self._stored(number))

    def replace(self, number: int, record: dict, answer: int) -> None:
        """Replace a sample by `record`, whose answer has the length `answer`."""
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self.rows[number]["offset"] = self.file.seek(0, os.SEEK_END)
        self.rows[number]["size"], self.rows[number]["answer"] = len(line), answer
        self.file.write(line)
        self.file.flush()

    def _stored(self, number: int) -> bytes:
        row = self.rows[number]
        return os.pread(self.file.fileno(), int(row["size"]), int(row["offset"]))

    def finding(self, what: str, *numbers: int) -> dict:
        """An entry of the list of findings, about samples of one problem."""
        finding: dict = {"finding": what, "problem": "", "answers": []}
        for number in numbers:
            row, record = self.rows[number], self.record(number)
            place = f"{self.sources[row['source']]}:{row['line']}"
            final = final_answer(record["output"]) or record.get("answer")
            finding["problem"] = record["instruction"]
            finding["answers"].append(
                {"place": place, "mode": record["mode"], "says": final, "length": int(row["answer"])}
            )
        return finding
