"""Scoring, verification and sampling, each in processes of its own that release their memory when they end."""

import json
import re
from itertools import groupby
from pathlib import Path

from rsft_lib.common.artifact import VERIFICATION
from rsft_lib.common.paths import resolve
from rsft_lib.common.progress import progress
from rsft_lib.launch.local import launch
from rsft_lib.launch.log import read_end


def launch_scoring(checkpoint: str | Path, data: str | Path, output: str | Path, nproc: int) -> None:
    """Write the loss of every trained token of tokenized data under a checkpoint into the folder `output`.

    A bar shows how many packs have been scored.
    `evaluation.token_losses.TokenLosses` reads it.

    Raises:
        RunFailed: the scoring failed; the message starts with the traceback.
    """
    folder = resolve(output)
    log = folder.with_name(f"{folder.name}.log")
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(folder)]
    with progress(f"score {folder.name}", " packs") as bar:

        def poll() -> None:
            if lines := re.findall(r"^scored (\d+) of (\d+) packs$", read_end(log, 4096), re.MULTILINE):
                done, bar.total = map(int, lines[-1])
                bar.update(done - bar.n)

        launch("rsft_lib.evaluation.score", arguments, nproc, log, poll)


def launch_verification(
    model: str | Path, checkpoint: str | Path, folder: str | Path, log: str | Path, *options: str
) -> dict:
    """Verify a model against a checkpoint, leave the report in `folder`, and return it.

    Args:
        options: further options of `checkpoint.verify`, as on its command line.

    Raises:
        RunFailed: the verification could not be made; the message starts with the traceback.
    """
    report = resolve(folder) / VERIFICATION
    arguments = ["--model", str(resolve(model)), "--checkpoint", str(resolve(checkpoint)), "--output", str(report)]
    launch("rsft_lib.checkpoint.verify", [*arguments, *options], 1, resolve(log))
    return json.loads(report.read_text(encoding="utf-8"))


def launch_sampling(
    asked: list, questions: str | Path, folder: str | Path, nproc: int, engine: str, batch_size: int
) -> None:
    """Write the answers that are asked for into `folder`, for `generation.sampled_answers.read_answers`.

    Those that are there are kept, whatever number of ranks wrote them. A bar shows how many files are complete.

    Args:
        asked: from `generation.sampled_answers.asked_of`.
        questions: the file that `data.clean_questions` wrote.
        nproc: ranks, each with the model on a GPU of its own or as a CPU process.
        engine, batch_size: see `generation.inference_engines.open_engine`.

    Raises:
        RunFailed: a rank failed; the message starts with its traceback.
    """
    from rsft_lib.generation.sampled_answers import CHUNK, chunks_of, read_questions  # slow

    file, folder = resolve(questions), resolve(folder)
    files = [chunk.file for one in asked for chunk in chunks_of(one, read_questions(file), folder)]
    if all(one.exists() for one in files):
        print(f"{folder} has all answers already")
        return
    log = folder.with_name("sampling.log")
    with progress("sample", f" files of {CHUNK} questions", len(files)) as bar:

        def poll() -> None:
            bar.update(sum(one.exists() for one in files) - bar.n)

        for _, own in groupby(asked, key=lambda one: one.model):  # the memory of each has to suffice
            arguments = [
                str(file),
                str(folder),
                json.dumps([*own]),
                "--engine",
                engine,
                "--batch-size",
                str(batch_size),
            ]
            launch("rsft_lib.generation.sampled_answers", arguments, nproc, log, poll)
