"""What went wrong in ranks that ended before they should: the words of the one that failed first, before all else."""

import re
from contextlib import suppress
from pathlib import Path

from rsft_lib.launch.log import read_end
from rsft_lib.training.run_folder import read_record
from rsft_lib.training.watchdog import read_stacks

ERRORS = "errors"  # folder beside the log, with what `record` of torch writes for each rank of a batch job
END = 2**20  # bytes at the end of a log in which a cause is looked for
LINES = 40
REPORT = "Root Cause (first observed failure):"  # what torchrun writes before it tells of the rank that failed first


class RunFailed(RuntimeError):
    """Ranks failed. A notebook shows what they said, and not where this process waited for them."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class RunStopped(RunFailed):
    """Ranks were asked to stop before they had anything to save, and did."""


def failure(module: str, log: Path, how: str, stopping: bool = False) -> RunFailed:
    """The error to raise where the ranks of `module` failed, as `how` tells; they may only have been `stopping`."""
    said = cause(log)
    by_itself = "Traceback" in said and "SignalException" not in said  # which is torchrun's
    if stopping and not by_itself and not read_stacks(log.parent):
        return RunStopped(f"stopped by you before it had anything to save ({how}); run again to go on")
    return RunFailed(f"{said}\n\n{module} failed ({how}); the whole log is {log}".lstrip())


def cause(log: Path) -> str:
    """What the rank that failed first said: the stacks of a run that hung, its traceback, or the end of the log."""
    stacks, text = read_stacks(log.parent), read_end(log, END)
    said = _recorded(log.parent / ERRORS) or _reported(text)
    if stacks and said.partition(":")[0] in ("", *stacks):  # else the others hung because that rank had failed
        listed = "\n\n".join(f"{rank}: {stack}" for rank, stack in stacks.items())
        return f"no progress; where the ranks stood:\n{listed}"
    return said or _printed(text)


def torchrun_reports(log: Path) -> bool:
    """Whether torchrun says at the end of its log that a rank failed."""
    return REPORT in read_end(log, END)


def _recorded(folder: Path) -> str:
    """The oldest of the tracebacks that ranks left in files."""
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        with suppress(ValueError, LookupError):  # a rank that was killed may leave half a file
            stack = read_record(path)["message"]["extraInfo"]["py_callstack"]
            return f"{path.stem.replace('rank', 'rank ')}: {stack.rstrip()}"
    return ""


def _reported(text: str) -> str:
    """The traceback, or the signal, that torchrun reports of the rank that failed first."""
    said = text.rpartition(REPORT)[2]
    rank = re.search(r"^ +rank +: (\d+)", said, flags=re.MULTILINE)
    told = re.search(r"^ +traceback : (.*?)\n(?:=|\Z)", said, flags=re.MULTILINE | re.DOTALL)
    if not (rank and told) or told[1].startswith("To enable"):  # it knows none of modules that do not use `record`
        return ""
    hint = " (was there too little memory?)" if "SIGKILL" in told[1] else ""
    return f"rank {rank[1]}: " + re.sub(r"^  ", "", told[1], flags=re.MULTILINE).rstrip() + hint


def _printed(text: str) -> str:
    """The last lines before torchrun's own, from a traceback on if there is one among them."""
    said = re.split(r"^[EW]\d{4} .*elastic/multiprocessing/api\.py", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = said.rstrip().splitlines()[-LINES:]
    first = next((i for i, line in enumerate(lines) if line.startswith("Traceback")), 0)
    return "\n".join(lines[first:])
