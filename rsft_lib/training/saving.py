"""Save checkpoints of a run atomically as `iter_0000000` folders, synchronously or in the background.

megatron-core plans which rank writes which tensors; threads write and hash the files here. megatron-core's own writers
are processes forked while CUDA runs, and the save hangs when one of them is killed.
"""

import errno
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.storage import WriteResult

from rsft_lib.checkpoint.formats.torch_dist import write_common, write_files
from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints
from rsft_lib.common.artifact import WRITERS, publish, read_manifest, require_space
from rsft_lib.common.locks import locked
from rsft_lib.model import engine
from rsft_lib.training.retention import remove_leftovers, remove_old, set_aside
from rsft_lib.training.state import LAYOUT, TrainState, content
from rsft_lib.training.watchdog import deadline

# Replaces a queue that megatron-core keeps in a separate process.
filesystem_async._results_queue = queue.Queue()


class Saver:
    """Writes the checkpoints of a run, one at a time; its methods are collective over all ranks."""

    def __init__(
        self, output: Path, model_config: Path, facts: dict, *, iteration: int, size: float, timeout: float,
        keep_last: int, keep_every: int,
    ):  # fmt: skip
        """`iteration` is the step at which the run starts; `size` the estimated bytes of its first checkpoint."""
        self.output, self.model_config, self.facts, self.size = output, model_config, facts, size
        self.timeout, self.keep_last, self.keep_every = timeout, keep_last, keep_every
        self.writing: _Writing | None = None
        self.publishing: Future | None = None
        self.background = ThreadPoolExecutor(1)
        self.lock = ExitStack()
        if _rank_0():
            remove_leftovers(output)
            remove_old(output, iteration, keep_last, keep_every)  # in case the last save was killed before that
            self.size = next(map(_bytes, reversed(checkpoints(output))), size)

    def save(self, state: TrainState, wait: bool) -> None:
        """Write a checkpoint of the current state; without `wait`, return once the tensors are copied.

        Raises:
            OSError: the disk is full; earlier checkpoints are kept.
        """
        with deadline(self.timeout):
            self.finish()
            final = checkpoint_folder(self.output, state.iteration)
            temporary = final.with_name(f".{final.name}.tmp")
            if _rank_0():
                self._make_room(temporary)
            torch.distributed.barrier()
            # Like megatron-core's `dist_checkpointing.save`, which in 0.19 pickles everything that is not a tensor.
            sharded, common = save_preprocess({**content(state), "content_metadata": LAYOUT}, True, _comparable)
            if _rank_0():
                write_common(temporary, common)
            request = engine.plan_save(sharded, temporary, threads=WRITERS)
            self.writing = _Writing(request, temporary, final, state.iteration)
            if wait:
                self.finish()

    def _make_room(self, temporary: Path) -> None:
        """Create the temporary folder of a checkpoint; it stays locked until it is renamed."""
        self.output.mkdir(parents=True, exist_ok=True)
        with ExitStack() as lock:
            lock.enter_context(locked(temporary, wait=False))
            if temporary.exists():
                shutil.rmtree(temporary)
            require_space(temporary, self.size)
            temporary.mkdir()
            self.lock = lock.pop_all()

    def written(self) -> bool:
        """Whether this rank has nothing left to write.

        Raises:
            TimeoutError: writing has exceeded `save_timeout`.
        """
        if self.writing and not self.writing.done.is_set() and time.monotonic() - self.writing.began > self.timeout:
            raise TimeoutError(f"{self.writing.final} was not written within save_timeout={self.timeout} s")
        return self.writing is None or self.writing.done.is_set()

    def go_on(self) -> None:
        """Complete a checkpoint that all ranks have `written`; it is renamed in the background."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        with deadline(self.timeout):
            try:
                with disk_full_details(writing.final, self.size):
                    files = writing.complete()
            except Exception:
                if _rank_0():
                    shutil.rmtree(writing.temporary, ignore_errors=True)  # all ranks have stopped
                    self.lock.close()
                raise
        if _rank_0():
            self.publishing = self.background.submit(self._publish, writing, files)

    def finish(self) -> None:
        """Wait until the current checkpoint is complete, and raise its error if it failed."""
        with deadline(self.timeout):
            self.go_on()
            if self.publishing:
                self.publishing.result()
                self.publishing = None
            torch.distributed.barrier()

    def _publish(self, writing: "_Writing", files: dict) -> None:
        with disk_full_details(writing.final, self.size):
            shutil.copyfile(self.model_config, writing.temporary / "config.json")
            facts = {"made_by": "train", "iteration": writing.iteration, **self.facts, "files": files}
            set_aside(writing.final)
            publish(writing.temporary, writing.final, facts)
        self.lock.close()
        self.size = _bytes(writing.final)
        remove_old(self.output, writing.iteration, self.keep_last, self.keep_every)


class _Writing:
    """A checkpoint being written: tensors are copied immediately, files are written by threads."""

    def __init__(self, request: AsyncRequest, temporary: Path, final: Path, iteration: int):
        self.request, self.temporary, self.final, self.iteration = request, temporary, final, iteration
        self.began, self.done = time.monotonic(), threading.Event()
        self.files: dict[str, dict] = {}
        self.result: dict[int, list[WriteResult]] | None = None
        self.failed: tuple[int, str] = (0, "")
        self.buckets = request.preload_fn() if request.preload_fn else []
        if not torch.cuda.is_available():  # on a CPU, the tensors are still those that training updates
            self.buckets = [
                (path, key, (raw, [(i, t.clone()) for i, t in ts])) for path, key, (raw, ts) in self.buckets
            ]
        threading.Thread(target=self._write, daemon=True).start()

    def _write(self) -> None:
        try:
            items = {Path(path): [*raw, *tensors] for path, _, (raw, tensors) in self.buckets}
            places, self.files = write_files({path: [data for _, data in pairs] for path, pairs in items.items()})
            self.result = {
                number: [
                    WriteResult(item.index, place.length, place)
                    for (item, _), place in zip(pairs, places[path], strict=True)
                ]
                for number, (path, pairs) in enumerate(items.items())
            }
        except Exception as error:
            self.failed = (getattr(error, "errno", None) or 0, f"{type(error).__name__}: {error}")
        self.done.set()

    def complete(self) -> dict[str, dict]:
        """Wait for the threads, and have megatron-core write the checkpoint's metadata.

        Returns:
            On the first rank, the manifest entries of the files of all ranks.

        Raises:
            OSError: on every rank, the error of the first rank that failed.
        """
        self.done.wait()
        failed = [self.failed] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(failed, self.failed)
        for rank, (number, text) in enumerate(failed):
            if text:
                message = f"{self.final} was not written; rank {rank}: {text}"
                raise OSError(number, message) if number else OSError(message)
        if self.buckets:
            filesystem_async._results_queue.put(self.result)
        for finalize in self.request.finalize_fns:
            finalize()
        files: list[dict] | None = [{}] * torch.distributed.get_world_size() if _rank_0() else None
        torch.distributed.gather_object(self.files, files)
        return {name: entry for written in files or [] for name, entry in written.items()}


@contextmanager
def disk_full_details(final: Path, size: float) -> Iterator[None]:
    """Add the size of the checkpoint `final` and the free space to a disk-full error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(final.parent).free
        raise OSError(
            error.errno,
            f"{error.strerror}: {final} needs about {size / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free. Free some "
            "space or set keep_last, then run again: the run resumes from the previous checkpoint",
        ) from None


def _bytes(checkpoint: Path) -> int:
    return sum(entry["bytes"] for entry in read_manifest(checkpoint)["files"].values())


def _comparable(common: dict) -> dict:
    """The non-tensor contents that must be the same on all ranks, without the optimizer's per-rank `param_state`."""
    return {**common, "optimizer": _without(common["optimizer"], "param_state")}


def _without(entry, name: str):
    """Nested dictionaries without the key `name`; with experts there is a dictionary for each of two optimizers."""
    return {k: _without(v, name) for k, v in entry.items() if k != name} if isinstance(entry, dict) else entry


def _rank_0() -> bool:
    return torch.distributed.get_rank() == 0
