"""Worker processes that import no more than their work needs.

`multiprocessing` would import the caller's main module into each of them, and with it torch and megatron-core: seconds
and half a gigabyte a process. These run `rsft_lib.data.worker.main`; one thread each sends it a call and waits for the
answer. Both are pickled, and the bytes pickled again: the bytes can always be read to their end, so what is in them may
be unreadable and the next message is still found.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from queue import Empty, SimpleQueue
from threading import Thread

from rsft_lib.data.worker import Job, Worker

CODE = "from rsft_lib.data.worker import main; main()"
# A process is for one core. Left alone, tokenizers (rayon) and BLAS start a thread for each of the machine in each.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"} | dict.fromkeys(
    ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
)
QUOTED = 4000  # bytes of stderr that are quoted of a process that died
DYING = 60  # seconds that a process has to be gone once its pipes are closed


class Process(subprocess.Popen):
    """A process that serves calls. Its stderr is kept in memory, to be quoted if it dies."""

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
        """Read the answer to a call; one that cannot be unpickled raises whatever pickle does.

        Raises:
            RuntimeError: the process died.
        """
        try:
            pickled = pickle.load(self.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self.death() from None
        return pickle.loads(pickled)

    def death(self) -> RuntimeError:
        """How the process ended, and what it wrote last."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(DYING)
        how = f"ended with exit code {self.returncode}"
        if (self.returncode or 0) < 0:
            name = signal.Signals(-self.returncode).name
            how = f"was killed by {name}{' (out of memory?)' * (name == 'SIGKILL')}"
        said = self.said()[-QUOTED:].strip()
        said = f"; the end of its stderr:\n{said}" if said else " and wrote nothing to stderr"
        return RuntimeError(f"nothing was written: a tokenizing process {how}{said}")

    def said(self) -> str:
        """All that it wrote to stderr so far; read without moving the position, at which it goes on writing."""
        return os.pread(self.log, os.fstat(self.log).st_size, 0).decode("utf-8", "backslashreplace")

    def close(self) -> str:
        """Close what a process that was killed leaves open: all that it wrote to stderr."""
        self.wait()
        said = self.said()
        self.stdout.close()
        os.close(self.log)
        return said


class Pool(Executor):
    """Calls methods of a `Worker` by name, each in whichever process is free."""

    def __init__(self, job: Job):
        self.job, self.calls = pickle.dumps(job, pickle.HIGHEST_PROTOCOL), SimpleQueue()
        self.processes, self.threads = [], []

    def grow(self, count: int) -> None:
        """Have at least `count` processes; each imports and takes the job while the caller goes on.

        Raises:
            RuntimeError: the machine has no more processes or threads to give.
        """
        while (running := len(self.threads)) < count:
            try:
                self.processes.append(Process())
                thread = Thread(target=self._serve, args=(self.processes[-1],), daemon=True)
                thread.start()
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"{running} tokenizing processes run, another cannot be started ({error}); set workers to fewer"
                ) from None
            self.threads.append(thread)

    def submit(self, method: str, *arguments) -> Future:
        self.calls.put((future := Future(), (method, arguments)))
        return future

    def _serve(self, process: Process) -> None:
        """Hand calls to a process until there is None; what goes wrong is raised to whoever waits for the answer."""
        with contextlib.suppress(Exception):  # its first call raises that again
            process.send(self.job)
        for future, call in iter(self.calls.get, None):
            try:
                process.send(pickle.dumps(call, pickle.HIGHEST_PROTOCOL))
                answer = process.receive()
            except Exception as error:
                answer = error
            (future.set_exception if isinstance(answer, Exception) else future.set_result)(answer)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes, whatever they do. What they wrote to stderr, warnings mostly, is shown: each text once."""
        with contextlib.suppress(Empty):
            while True:
                self.calls.get_nowait()
        for process in self.processes:
            process.kill()
            self.calls.put(None)
        for thread in self.threads:
            thread.join()
        print(*dict.fromkeys(process.close() for process in self.processes), sep="", end="", file=sys.stderr)


class Here(Executor):
    """Does at once, in this process, what a pool would do in others."""

    def __init__(self, job: Job):
        self.worker = Worker(job)

    def grow(self, count: int) -> None:
        """There is only one."""

    def submit(self, method: str, *arguments) -> Future:
        future = Future()
        future.set_result(getattr(self.worker, method)(*arguments))
        return future


@contextlib.contextmanager
def pool_for(job: Job, count: int) -> Iterator[Pool | Here]:
    """`count` processes for a job, or this one where it is 0; they are gone when the block ends."""
    pool = Pool(job) if count else Here(job)
    try:
        pool.grow(count)
        yield pool
    finally:
        pool.shutdown()
