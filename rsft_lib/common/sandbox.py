"""CPU and memory limits for untrusted code: a chat template is a program and may never terminate."""

import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rsft_lib.common.parent_death import die_with_parent

SECONDS, MEMORY = 4, 512 << 20  # a thousand times what rendering a conversation needs
DEADLINE = 300  # seconds of wall time for a process of `run_with_limits`, with its start on a busy machine


@contextmanager
def limited(what: str, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Run the block with at most `seconds` of CPU time and `memory` bytes on top of what the process already uses.

    Both limits apply to the whole process: use it in the main thread of a process that does nothing else. A single
    call into C, such as a power of huge numbers, is not interrupted; use `end_after` for that.

    Raises:
        ValueError: the block exceeds a limit; the message begins with `what`.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory(memory)
    try:
        with time_limit(what, seconds):
            yield
    except MemoryError:
        raise ValueError(f"{what} takes more than {memory >> 20} MiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def time_limit(what: str, seconds: float = SECONDS) -> Iterator[None]:
    """`limited` without the memory limit; it costs two microseconds."""
    before = signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except TimeoutError:
        raise ValueError(f"{what} takes more than {seconds} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(memory: int) -> None:
    """Let this process allocate at most `memory` more bytes; beyond that, allocations raise MemoryError."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _address_space() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def end_after(seconds: int) -> None:
    """Have the kernel kill this process after `seconds` more of CPU time, even inside a call into C."""
    hard = math.ceil(_cpu_seconds()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def run_with_limits(module: str, *arguments: str, stdin: str = "") -> str:
    """Run a module that limits itself, in a process with a timeout, since it could sleep; return its output.

    Raises:
        ValueError: it ended with an error, was killed, or did not finish; the message is the last line of its stderr.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=DEADLINE, preexec_fn=die_with_parent
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"rendering did not finish within {DEADLINE} seconds") from None
    if done.returncode < 0:
        raise ValueError(f"rendering was killed by signal {-done.returncode} after more than {SECONDS} seconds")
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["it failed without a message"])[-1])
    return done.stdout


def _out_of_time(number, frame) -> None:
    raise TimeoutError


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _address_space() -> int:
    """Size of this process's address space in bytes (proc(5): first field of statm, in pages)."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
