"""Worker processes that import no more than their work needs.

`multiprocessing` would import the caller's main module into each of them, and with it torch and megatron-core: seconds
and half a gigabyte a process. These run `rsft_lib.data.worker.main`; one thread each sends it a call and waits for the
answer, both pickled.
"""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

from rsft_lib.data.worker import Job, Worker


class Pool(Executor):
    """Calls methods of a `Worker` by name, each in whichever process is free."""

    def __init__(self, count: int):
        """Start `count` processes; while they import, the caller can prepare the job."""
        command = [sys.executable, "-c", "from rsft_lib.data.worker import main; main()"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)
        ]
        self.threads, self.idle = ThreadPoolExecutor(count), SimpleQueue()

    def begin(self, job: Job) -> None:
        """Give the job to every process; it is the first thing that each reads."""
        for process in self.processes:
            self._send(process, job)
            self.idle.put(process)

    def submit(self, method: str, *arguments) -> Future:
        return self.threads.submit(self._call, method, arguments)

    def _call(self, method: str, arguments: tuple):
        process = self.idle.get()
        try:
            self._send(process, (method, arguments))
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise RuntimeError("a tokenizing process was killed (out of memory?); nothing was written") from None
        finally:
            self.idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @staticmethod
    def _send(process: subprocess.Popen, message) -> None:
        pickle.dump(message, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        process.stdin.flush()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()
        self.threads.shutdown(wait, cancel_futures=cancel_futures)


class Here(Executor):
    """Does at once, in this process, what a pool would do in others."""

    def begin(self, job: Job) -> None:
        self.worker = Worker(job)

    def submit(self, method: str, *arguments) -> Future:
        future = Future()
        future.set_result(getattr(self.worker, method)(*arguments))
        return future


@contextmanager
def pool_of(count: int) -> Iterator[Pool | Here]:
    """`count` processes, or this one where it is 0; they are gone when the block ends."""
    pool = Pool(count) if count else Here()
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
