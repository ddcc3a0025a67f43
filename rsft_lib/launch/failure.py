"""Errors for failed ranks, starting with the first failing rank's error."""

import re
from contextlib import suppress
from pathlib import Path

from rsft_lib.launch.log import read_end
from rsft_lib.training.run_folder import read_record
from rsft_lib.training.watchdog import read_stacks

ERRORS = "errors"  # folder beside the log with the error files of a batch job's ranks, written by torch's `record`
END = 2**20  # bytes at the end of a log that are searched for a cause
LINES = 40
REPORT = "Root Cause (first observed failure):"  # torchrun's heading for the rank that failed first


class RunFailed(RuntimeError):
    """Ranks failed. A notebook shows their error instead of this process's traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class RunStopped(RunFailed):
    """Ranks stopped as requested, before they had anything to save."""


def failure(module: str, log: Path, how: str, stopping: bool = False) -> RunFailed:
    """The error to raise for failed ranks of `module`.

    Args:
        how: the exit code or state.
        stopping: whether they were asked to stop.
    """
    error = cause(log)
    by_itself = "Traceback" in error and "SignalException" not in error  # the latter is torchrun's own
    if stopping and not by_itself and not read_stacks(log.parent):
        return RunStopped(f"stopped by you before it had anything to save ({how}); run again to restart")
    return RunFailed(f"{error}\n\n{module} failed ({how}); full log: {log}".lstrip())


def cause(log: Path) -> str:
    """The first failing rank's error: the stacks of a run that hung, its traceback, or the end of the log."""
    stacks, text = read_stacks(log.parent), read_end(log, END)
    error = _recorded(log.parent / ERRORS) or _reported(text)
    if stacks and error.partition(":")[0] in ("", *stacks):  # otherwise they hung because another rank had failed
        listed = "\n\n".join(f"{rank}: {stack}" for rank, stack in stacks.items())
        return f"no progress; stacks of the ranks:\n{listed}"
    return error or _printed(text)


def torchrun_reports(log: Path) -> bool:
    """Whether torchrun reports a failed rank at the end of the log."""
    return REPORT in read_end(log, END)


def _recorded(folder: Path) -> str:
    """The oldest traceback in the ranks' error files."""
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(ValueError, LookupError):  # a killed rank may leave an incomplete file
            stack = read_record(path)["message"]["extraInfo"]["py_callstack"]
            return f"{path.stem.replace('rank', 'rank ')}: {stack.rstrip()}"
    return ""


def _reported(text: str) -> str:
    """The first failing rank's traceback or signal in torchrun's report."""
    report = text.rpartition(REPORT)[2]
    rank = re.search(r"^ +rank +: (\d+)", report, flags=re.MULTILINE)
    error = re.search(r"^ +traceback : (.*?)\n(?:=|\Z)", report, flags=re.MULTILINE | re.DOTALL)
    if not (rank and error) or error[1].startswith("To enable"):  # no traceback of modules that do not use `record`
        return ""
    hint = " (out of memory?)" if "SIGKILL" in error[1] else ""
    return f"rank {rank[1]}: " + re.sub(r"^  ", "", error[1], flags=re.MULTILINE).rstrip() + hint


def _printed(text: str) -> str:
    """The last lines before torchrun's own, starting with a traceback if there is one."""
    output = re.split(r"^[EW]\d{4} .*elastic/multiprocessing/api\.py", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = output.rstrip().splitlines()[-LINES:]
    first = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), 0)
    return "\n".join(lines[first:])
