"""The small files in a run folder, beside checkpoints, metrics and log: what the run is, and how it ended."""

import json
from pathlib import Path

CONFIG = "config.json"
JOB = "job.json"
LOG = "train.log"
ENDED = "ended.json"
STOPPING = ".stopping"  # somebody asked it to stop

WORDS = {
    "finished": "finished", "alarm": "stopped by an alarm", "time limit": "stopped at the time limit",
    "SIGINT": "stopped by you", "SIGTERM": "terminated (by scheduler or system, or its notebook was closed)",
}  # fmt: skip


def read_record(path: Path) -> dict:
    """The JSON object in a file; empty where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, expected an object")
    return found


def read_ended(folder: Path) -> dict:
    """Why a run ended (`reason`) and after which step (`iteration`); empty while it runs, or when it was killed.

    A damaged file is a reason, and no error: what has been saved does not depend upon it.
    """
    try:
        found = read_record(Path(folder) / ENDED)
    except ValueError as error:
        return {"reason": f"unknown, since {error}"}
    whole = isinstance(found.get("reason"), str) and type(found.get("iteration")) is int
    return found if not found or whole else {"reason": f"unknown: {ENDED} does not tell"}


def how_it_ended(folder: Path) -> str:
    """The same reason as people say it; empty where there is none."""
    reason = read_ended(folder).get("reason", "")
    if reason == "SIGTERM" and (Path(folder) / STOPPING).exists():
        return WORDS["SIGINT"]
    return WORDS.get(reason, reason)
