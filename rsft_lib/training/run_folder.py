"""The small files in a run folder: settings, job and how the run ended."""

import json
from pathlib import Path

CONFIG = "config.json"
JOB = "job.json"
LOG = "train.log"
ENDED = "ended.json"
STOPPING = ".stopping"  # exists once the run was asked to stop

DESCRIPTIONS = {
    "finished": "finished", "alarm": "stopped by an alarm", "time limit": "stopped at the time limit",
    "SIGINT": "stopped by you", "SIGTERM": "terminated (by scheduler or system, or its notebook was closed)",
}  # fmt: skip


def read_record(path: Path) -> dict:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it contains a {type(record).__name__}, expected an object")
    return record


def read_ended(folder: Path) -> dict:
    """Why a run ended (`reason`) and after which step (`iteration`); empty while it runs, or if it was killed.

    A damaged file is reported as the reason and not as an error, since checkpoints do not depend on it.
    """
    try:
        ended = read_record(Path(folder) / ENDED)
    except ValueError as error:
        return {"reason": f"unknown, since {error}"}
    complete = isinstance(ended.get("reason"), str) and type(ended.get("iteration")) is int
    return ended if not ended or complete else {"reason": f"unknown: reason or iteration missing in {ENDED}"}


def how_it_ended(folder: Path) -> str:
    """A description of the reason; empty if there is none."""
    reason = read_ended(folder).get("reason", "")
    if reason == "SIGTERM" and (Path(folder) / STOPPING).exists():
        return DESCRIPTIONS["SIGINT"]
    return DESCRIPTIONS.get(reason, reason)
