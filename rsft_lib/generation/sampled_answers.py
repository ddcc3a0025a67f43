"""Answers of a model to many questions, several to each in one mode: a file for every 64 questions, complete or absent.

A file is named after what `Asked` has and its questions. Its answers are computed together, on a CPU in one thread, so
its bytes depend neither on the number of ranks nor on what was written before a kill.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import compress, islice
from pathlib import Path
from typing import NamedTuple

import torch

from rsft_lib.common.artifact import MANIFEST, file_hash, own_manifest
from rsft_lib.common.temporary import new_file
from rsft_lib.data.records import read_records
from rsft_lib.generation.answer import Answer
from rsft_lib.generation.generate import Speaker, dialect_of_any, open_speaker
from rsft_lib.generation.inference_engines import BATCH, Sampling
from rsft_lib.generation.questions import Question

CHUNK = 64  # questions
OF_TORCHRUN = ("TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_")


class Asked(NamedTuple):
    """What is asked of a model: `samples` answers to every question, in the mode 'think' or 'short'."""

    model: str
    identity: str
    mode: str
    samples: int
    sampling: Sampling


class Chunk(NamedTuple):
    """Consecutive questions, and the file of their answers."""

    file: Path
    questions: list[Question]


def asked_of(model: Path, short_model: Path, samples: int, sampling: Sampling) -> list[Asked]:
    """What is asked: long answers of `model`, and short ones of `short_model`, which may be the same.

    Raises:
        ValueError: `model` does not think, or `samples` is below 1.
    """
    if not dialect_of_any(model).forms:
        raise ValueError(
            f"{model} has no <think> in its vocabulary and writes no long answers: choose a reasoning model as "
            "`model`, and give this one as `short_model`"
        )
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1")
    identities = {one: _identity(one) for one in {model, short_model}}
    models = {"think": model, "short": short_model}
    return [Asked(str(one), identities[one], mode, samples, sampling) for mode, one in models.items()]


def _identity(model: Path) -> str:
    """The hash of a model's manifest, or, if this kit did not write the folder, of the hashes of its files."""
    if own_manifest(model):
        return file_hash(model / MANIFEST)
    files = sorted(path for path in model.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return hashlib.sha256(json.dumps([(path.name, file_hash(path)) for path in files]).encode()).hexdigest()


def read_questions(file: Path) -> list[Question]:
    """The questions that `data.clean_questions` wrote."""
    return [Question(one["messages"], one.get("tools"), one["answer"]) for _, one in read_records(file)]


def chunks_of(asked: Asked, questions: list[Question], folder: Path) -> Iterator[Chunk]:
    """All chunks, whether or not they are written."""
    shape = [asked.identity, asked.mode, asked.samples, *asked.sampling]
    for start in range(0, len(questions), CHUNK):
        own = questions[start : start + CHUNK]
        content = json.dumps([*shape, *([one.messages, one.tools] for one in own)])
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        yield Chunk(folder / f"{asked.mode}-{name}.jsonl", own)


def read_answers(asked: Asked, questions: list[Question], folder: Path) -> Iterator[list[Answer]]:
    """The answers to each question, once all chunks are written."""
    dialect = dialect_of_any(asked.model)
    for chunk in chunks_of(asked, questions, folder):
        for _, record in read_records(chunk.file):
            yield [Answer(**one, dialect=dialect) for one in record["answers"]]


def write_missing(
    asked: list[Asked],
    questions: list[Question],
    folder: Path,
    engine: str = "auto",
    batch_size: int = BATCH,
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Write every chunk of a rank's share that does not exist; all of `asked` are of one model."""
    missing = [
        (one.mode, one.samples, one.sampling, chunk)
        for one in asked
        for number, chunk in enumerate(chunks_of(one, questions, folder))
        if number % ranks == rank and not chunk.file.exists()
    ]
    if missing:
        model = asked[0].model
        speaker = open_speaker(model, engine, batch_size, dialect_of_any(model))
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        room = config.get("max_position_embeddings", sys.maxsize)
    folder.mkdir(parents=True, exist_ok=True)
    for mode, samples, sampling, chunk in missing:
        askable = [_is_askable(speaker, question, mode, room) for question in chunk.questions]
        asking = [(question, mode) for question in compress(chunk.questions, askable) for _ in range(samples)]
        answers = iter(speaker.answers(asking, sampling))
        with new_file(chunk.file) as file:
            file.writelines(_line(list(islice(answers, samples * able))) for able in askable)


def _is_askable(speaker: Speaker, question: Question, mode: str, room: int) -> bool:
    """Whether the model's chat template takes a question, and the model has room for it; else it has no answers."""
    try:
        if (length := len(speaker.prompt(question, mode))) < room:
            return True
        error = ValueError(f"{length:,} tokens, but the model has {room:,} positions")
    except ValueError as refused:
        error = refused
    print(f"not asked: {question.text[:100]!r}: {error}", flush=True)
    return False


def _line(answers: list[Answer]) -> str:
    found = [{"text": answer.text, "tokens": answer.tokens, "ended": answer.ended} for answer in answers]
    return json.dumps({"answers": found}, ensure_ascii=False) + "\n"


def _own_device(local: int) -> None:
    """Let this process see the GPU of its rank only, if there are any; before CUDA starts."""
    visible, gpus = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    if not gpus:
        return
    if local >= gpus:
        raise ValueError(f"nproc is above the number of visible GPUs, {gpus}; every rank needs one of its own")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local] if visible else str(local)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the answers that are missing, as one of the ranks of torchrun.")
    parser.add_argument("questions", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("asked", type=json.loads, help="JSON: a list of the fields of each `Asked`")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    given = parser.parse_args()
    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    _own_device(local)
    for name in [name for name in os.environ if name.startswith(OF_TORCHRUN)]:
        del os.environ[name]  # vLLM's own process group would wait for a store of torchrun's
    torch.set_num_threads(1)  # on a CPU, rounding depends on it
    asked = [Asked(*one)._replace(sampling=Sampling(*one[Asked._fields.index("sampling")])) for one in given.asked]
    write_missing(asked, read_questions(given.questions), given.folder, given.engine, given.batch_size, rank, ranks)


if __name__ == "__main__":
    main()
