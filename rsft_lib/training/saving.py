"""Save checkpoints of a run atomically as `iter_0000000` folders, synchronously or in the background.

Every rank writes and hashes its share of the tensors in threads, from the GPU or, in the background, from a copy.
"""

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.metadata import MetadataIndex

from rsft_lib.checkpoint.formats.torch_dist import SUFFIX, write_common, write_files, write_metadata
from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints
from rsft_lib.checkpoint.sharded import SHARDING, value_of
from rsft_lib.common.artifact import publish, read_manifest, require_space
from rsft_lib.common.locks import locked
from rsft_lib.training.retention import remove_leftovers, remove_old, set_aside
from rsft_lib.training.save_plan import SavePlan, plan_save
from rsft_lib.training.staging import Staging
from rsft_lib.training.state import TrainState, content, weights_of
from rsft_lib.training.watchdog import deadline


class Saver:
    """Writes the checkpoints of a run, one at a time; its methods are collective over all ranks."""

    def __init__(
        self, output: Path, model_config: Path, facts: dict, *, iteration: int, size: float, timeout: float,
        keep_last: int, keep_every: int, keep_best: str = "",
    ):  # fmt: skip
        """`iteration` is the step at which the run starts; `size` the estimated bytes of a checkpoint."""
        self.output, self.model_config, self.facts, self.size = output, model_config, facts, size
        self.timeout = timeout
        self.remove_old = partial(remove_old, output, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self.writing: _Writing | None = None
        self.staging: Staging | None = None
        self.publishing: Future | None = None
        self.background = ThreadPoolExecutor(1)
        self.lock = ExitStack()
        if _rank_0():
            remove_leftovers(output)
            self.remove_old(iteration)  # in case the last save was killed before that
            self.size = max(size, next(map(_bytes, reversed(checkpoints(output))), 0))  # moments may grow on resuming

    def reserve(self, state: TrainState) -> None:
        """Allocate the memory for saves in the background now, which takes seconds, and not at the first of them."""
        with deadline(self.timeout):
            plan, _ = _planned(content(state))
            self.staging = Staging(plan.nbytes, sum(map(len, plan.files)))

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
            plan, common = _planned(content(state))
            if _rank_0():
                write_common(temporary, common)
            self.writing = _Writing(plan, self._values(plan, copied=not wait), temporary, final, state.iteration)
            if wait:
                self.finish()

    def _values(self, plan: SavePlan, copied: bool) -> Callable[[ShardedTensor], torch.Tensor]:
        """The function that returns the value of a planned tensor on the CPU; `copied` if training will change it."""
        if not copied:
            return _on_cpu
        self.staging = self.staging or Staging(plan.nbytes, sum(map(len, plan.files)))
        self.staging.used = 0
        copies = {id(place): self.staging.copy(value_of(place)) for places in plan.files for place in places}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return lambda place: copies[id(place)]

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
        self.remove_old(writing.iteration)


class _Writing:
    """A checkpoint being written by threads."""

    def __init__(
        self, plan: SavePlan, value: Callable[[ShardedTensor], torch.Tensor], temporary: Path, final: Path,
        iteration: int,
    ):  # fmt: skip
        self.plan, self.temporary, self.final, self.iteration = plan, temporary, final, iteration
        self.began, self.done = time.monotonic(), threading.Event()
        self.files: dict[str, dict] = {}
        self.stored: dict = {}
        self.failed: tuple[int, str] = (0, "")
        threading.Thread(target=self._write, args=[value], daemon=True).start()

    def _write(self, value: Callable[[ShardedTensor], torch.Tensor]) -> None:
        rank = torch.distributed.get_rank()
        paths = [self.temporary / f"__{rank}_{number}{SUFFIX}" for number in range(len(self.plan.files))]
        contents = dict(zip(paths, self.plan.files, strict=True))
        try:
            places, self.files = write_files({path: map(value, parts) for path, parts in contents.items()})
            for path, parts in contents.items():
                indices = (MetadataIndex(part.key, torch.Size(part.global_offset)) for part in parts)
                self.stored |= zip(indices, places[path], strict=True)
        except Exception as error:
            self.failed = (getattr(error, "errno", None) or 0, f"{type(error).__name__}: {error}")
        self.done.set()

    def complete(self) -> dict[str, dict]:
        """Wait for the threads of all ranks, and write the checkpoint's metadata.

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
        gathered: list | None = [None] * torch.distributed.get_world_size() if _rank_0() else None
        torch.distributed.gather_object((self.files, self.stored), gathered)
        files: dict[str, dict] = {}
        stored: dict = {}
        for of_rank, places in gathered or []:
            files |= of_rank
            stored |= places
        if _rank_0():
            write_metadata(self.temporary, self.plan.layout, stored)
        return files


def write_weights(state: TrainState, folder: Path) -> None:
    """Write the weights alone into `folder`, as in a checkpoint but without manifest and config; collective.

    Raises:
        OSError: on every rank, if the disk is full for any.
    """
    plan, _ = _planned({**weights_of(state)})
    _Writing(plan, _on_cpu, folder, folder, state.iteration).complete()


def _on_cpu(place: ShardedTensor) -> torch.Tensor:
    return value_of(place).cpu().contiguous()


def _planned(contents: dict) -> tuple[SavePlan, dict]:
    """This rank's share of a checkpoint with `contents`, and what it has besides tensors."""
    given = {**contents, "content_metadata": SHARDING}
    sharded, common = save_preprocess(given, validate_access_integrity=False)  # `plan_save` validates it
    return plan_save(list(nested_values(sharded))), common


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


def _rank_0() -> bool:
    return torch.distributed.get_rank() == 0
