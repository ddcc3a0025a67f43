"""A pool of lightweight worker processes for tokenization.

`multiprocessing` would import the caller's main module, and with it torch in many a script, into each process: seconds
and half a gigabyte each. These processes run only `rsft_lib.data.worker.main`; one thread per process sends calls and
receives the results. Messages are pickled twice: the outer bytes can always be read completely, so a message whose
content cannot be unpickled does not desynchronize the stream.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO

from rsft_lib.data.worker import Job, Worker

CODE = "from rsft_lib.data.worker import main; main()"
# Each process uses one core. By default, tokenizers (rayon) and BLAS would start one thread per core in each process.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
STDERR_TAIL = 4000  # characters of a dead process's stderr in the error message
EXIT_TIMEOUT = 60  # seconds to wait for a process whose pipes are closed


class Process(subprocess.Popen):
    """A process that serves calls. Its stderr is kept in memory, for the error message if it dies."""

    stdin: IO[bytes]
    stdout: IO[bytes]

    def __init__(self):
        self.log = os.memfd_create("stderr")
        command, pipe = [sys.executable, "-c", CODE], subprocess.PIPE
        super().__init__(command, stdin=pipe, stdout=pipe, stderr=self.log, env=os.environ | ONE_THREAD)

    def send(self, pickled: bytes) -> None:
        """Write a job or a call.

        Raises:
            RuntimeError: the process died.
        """
        try:
            pickle.dump(pickled, self.stdin, pickle.HIGHEST_PROTOCOL)
            self.stdin.flush()
        except OSError:
            raise self.death() from None

    def receive(self):
        """Read the result of a call; if it cannot be unpickled, pickle's exception is raised.

        Raises:
            RuntimeError: the process died.
        """
        try:
            pickled = pickle.load(self.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self.death() from None
        return pickle.loads(pickled)

    def death(self) -> RuntimeError:
        """The error for a dead process: how it ended, and the end of its stderr."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(EXIT_TIMEOUT)
        how = f"ended with exit code {self.returncode}"
        if (self.returncode or 0) < 0:
            name = signal.Signals(-self.returncode).name
            how = f"was killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
        tail = self.stderr_text()[-STDERR_TAIL:].strip()
        tail = f"; the end of its stderr:\n{tail}" if tail else " and wrote nothing to stderr"
        return RuntimeError(f"nothing was written: a tokenizing process {how}{tail}")

    def stderr_text(self) -> str:
        """Its stderr so far; pread leaves the shared file offset at which the process writes."""
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode("utf-8", "backslashreplace")

    def close(self) -> str:
        """Close the pipes of a killed process and return its stderr."""
        self.wait()
        text = self.stderr_text()
        self.stdout.close()
        os.close(self.log)
        return text


class Pool:
    """Calls methods of a `Worker` by name, in any free process."""

    def __init__(self, job: Job):
        self.job = pickle.dumps(job, pickle.HIGHEST_PROTOCOL)
        self.calls: SimpleQueue[tuple[Future, tuple[str, tuple]] | None] = SimpleQueue()  # None ends a thread
        self.processes: list[Process] = []
        self.threads: list[Thread] = []

    def grow(self, count: int) -> None:
        """Start processes until there are `count`; they import modules and receive the job in the background.

        Raises:
            RuntimeError: no further process or thread can be started.
        """
        while (running := len(self.threads)) < count:
            try:
                self.processes.append(Process())
                thread = Thread(target=self._serve, args=(self.processes[-1],), daemon=True)
                thread.start()
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"cannot start more than {running} tokenizing processes ({error}); reduce workers"
                ) from None
            self.threads.append(thread)

    def submit(self, method: str, *arguments) -> Future:
        """Call a method with `arguments`; the future has its result or its exception."""
        future: Future = Future()
        self.calls.put((future, (method, arguments)))
        return future

    def _serve(self, process: Process) -> None:
        """Send calls to a process until the queue yields None; exceptions are set on the futures."""
        with contextlib.suppress(Exception):  # the first call raises it again
            process.send(self.job)
        for future, call in iter(self.calls.get, None):
            try:
                process.send(pickle.dumps(call, pickle.HIGHEST_PROTOCOL))
                result = process.receive()
            except Exception as error:
                result = error
            (future.set_exception if isinstance(result, Exception) else future.set_result)(result)

    def shutdown(self) -> None:
        """Kill all processes and print their stderr, mostly warnings; identical texts are printed once."""
        with contextlib.suppress(Empty):
            while True:
                self.calls.get_nowait()
        for process in self.processes:
            process.kill()
            self.calls.put(None)
        for thread in self.threads:
            thread.join()
        print(*dict.fromkeys(process.close() for process in self.processes), sep="", end="", file=sys.stderr)


class InProcess:
    """Runs the calls of a pool immediately, in this process."""

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def grow(self, count: int) -> None:
        """Do nothing: there is only this process."""

    def submit(self, method: str, *arguments) -> Future:
        """Call a method with `arguments` now; an exception is raised."""
        future: Future = Future()
        future.set_result(getattr(self.worker, method)(*arguments))
        return future

    def shutdown(self) -> None:
        """Do nothing: there are no processes to end."""


@contextlib.contextmanager
def pool_for(job: Job, count: int) -> Iterator[Pool | InProcess]:
    """A pool of `count` processes, or this process if `count` is 0; shut down when the block ends."""
    pool = Pool(job) if count else InProcess(job)
    try:
        pool.grow(count)
        yield pool
    finally:
        pool.shutdown()
