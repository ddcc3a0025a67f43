"""Checkpoints of a run: `iter_0000000` folders that are whole or absent, written while training waits or goes on.

megatron-core plans which rank writes what; the writing itself is done here by threads, which hash on the way. Its own
writers are forked processes, which are waited for for ever when one is killed, and fork while CUDA runs.
"""

import queue
import shutil
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.storage import WriteResult

from rsft_lib.artifact import WRITERS, publish
from rsft_lib.checkpoint.torch_dist import write_files
from rsft_lib.training.state import LAYOUT, TrainState, content
from rsft_lib.training.watchdog import deadline

# In place of a queue that megatron-core keeps in yet another process.
filesystem_async._results_queue = queue.Queue()


class Saver:
    """Writes the checkpoints of a run, one at a time; all ranks call it together."""

    def __init__(
        self, output: Path, model_config: Path, facts: dict, *, timeout: float, keep_last: int, keep_every: int
    ):
        self.output, self.model_config, self.facts = output, model_config, facts
        self.timeout, self.keep_last, self.keep_every = timeout, keep_last, keep_every
        self.writing: _Writing | None = None
        self.publishing: Future | None = None
        self.background = ThreadPoolExecutor(1)

    def save(self, state: TrainState, wait: bool) -> None:
        """Write a checkpoint of this moment; without `wait`, go on when the tensors are copied."""
        with deadline(self.timeout):
            self.finish()
            final = self.output / f"iter_{state.iteration:07d}"
            temporary = final.with_name(f".{final.name}.tmp")
            if _rank_0():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            torch.distributed.barrier()
            strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=WRITERS)  # as many files a rank
            request = dist_checkpointing.save(
                content(state), str(temporary), strategy, async_sharded_save=True, content_metadata=LAYOUT,
                preprocess_common_before_consistancy_check=_comparable,
            )  # fmt: skip
            self.writing = _Writing(request, temporary, final, state.iteration)
            if wait:
                self.finish()

    def written(self) -> bool:
        """Whether this rank has nothing left to write.

        Raises:
            TimeoutError: it has been writing for longer than it may.
        """
        if self.writing and not self.writing.done.is_set() and time.monotonic() - self.writing.began > self.timeout:
            raise TimeoutError(f"{self.writing.final} was not written within save_timeout {self.timeout} s")
        return self.writing is None or self.writing.done.is_set()

    def go_on(self) -> None:
        """Complete a checkpoint that every rank has `written`: its name comes in the background."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        with deadline(self.timeout):
            files = writing.complete()
        if _rank_0():
            self.publishing = self.background.submit(self._publish, writing, files)

    def finish(self) -> None:
        """Wait until nothing is being written any more, and raise what went wrong."""
        with deadline(self.timeout):
            self.go_on()
            if self.publishing:
                self.publishing.result()
                self.publishing = None
            torch.distributed.barrier()

    def _publish(self, writing: "_Writing", files: dict) -> None:
        shutil.copyfile(self.model_config, writing.temporary / "config.json")
        facts = {"made_by": "train", "iteration": writing.iteration, **self.facts, "files": files}
        publish(writing.temporary, writing.final, facts)
        remove_old(self.output, self.keep_last, self.keep_every)


class _Writing:
    """A checkpoint on its way to disk: tensors are copied at once, files written by threads."""

    def __init__(self, request: AsyncRequest, temporary: Path, final: Path, iteration: int):
        self.request, self.temporary, self.final, self.iteration = request, temporary, final, iteration
        self.began, self.done, self.files, self.result = time.monotonic(), threading.Event(), {}, None
        self.buckets = request.preload_fn() if request.preload_fn else []
        if not torch.cuda.is_available():  # nothing was copied from anywhere, and training would write on
            self.buckets = [
                (path, key, (raw, [(i, t.clone()) for i, t in ts])) for path, key, (raw, ts) in self.buckets
            ]
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        items = {Path(path): [*raw, *tensors] for path, _, (raw, tensors) in self.buckets}
        try:
            places, self.files = write_files({path: [data for _, data in found] for path, found in items.items()})
            self.result = {
                number: [
                    WriteResult(item.index, place.length, place)
                    for (item, _), place in zip(found, places[path], strict=True)
                ]
                for number, (path, found) in enumerate(items.items())
            }
        except Exception as error:
            self.result = error
        self.done.set()

    def complete(self) -> dict[str, dict]:
        """Wait for the threads, let megatron-core write what describes the files, and raise what went wrong anywhere.

        Returns:
            On the first rank, the manifest's entries of the files that all ranks have written.
        """
        self.done.wait()
        if self.buckets:
            filesystem_async._results_queue.put(self.result)
        torch.distributed.barrier()
        for finalize in self.request.finalize_fns:
            finalize()
        files = [{}] * torch.distributed.get_world_size() if _rank_0() else None
        torch.distributed.gather_object(self.files, files)
        return {name: entry for written in files or [] for name, entry in written.items()}


def remove_old(output: Path, keep_last: int, keep_every: int) -> None:
    """Remove all checkpoints but the last `keep_last` and those of steps that divide by `keep_every`; 0 keeps all.

    A folder is renamed before it is emptied, so what has the name of a checkpoint is whole.
    """
    for leftover in output.glob(".iter_*.old*"):
        shutil.rmtree(leftover)
    if not keep_last:
        return
    for folder in sorted(output.glob("iter_*"))[:-keep_last]:
        if keep_every and int(folder.name.removeprefix("iter_")) % keep_every == 0:
            continue
        old = folder.with_name(f".{folder.name}.old")
        folder.rename(old)
        shutil.rmtree(old)


def _comparable(common: dict) -> dict:
    """What is no tensor and must be alike on all ranks; of states that a rank has none of, a name alone is left."""
    return {**common, "optimizer": {k: v for k, v in common["optimizer"].items() if k != "param_state"}}


def _rank_0() -> bool:
    return torch.distributed.get_rank() == 0
