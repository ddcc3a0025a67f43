"""Loading this rank's share of a global batch, and running it through the model."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rsft_lib.common.device import device
from rsft_lib.data.packed import PackedDataset, rank_share
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loss import MicroBatch, forward_step, micro_batch
from rsft_lib.training.loss_stats import SIZE
from rsft_lib.training.state import TrainState
from rsft_lib.training.watchdog import beat


class Loader:
    """A rank's micro-batches of a dataset; a thread prepares each one during the computation of the previous one."""

    def __init__(self, data: PackedDataset, config: TrainConfig):
        self.data, self.config, self.thread = data, config, ThreadPoolExecutor(1)
        self.rank = parallel_state.get_context_parallel_rank()
        self.ranks = parallel_state.get_context_parallel_world_size()
        self.ahead: tuple[list[int], Future] | None = None
        self.waited = 0.0
        """Seconds that the computation waited for data."""

    def share(self, packs: list[int]) -> list[list[int]]:
        """This data-parallel rank's packs of a global batch, by micro-batch."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        costs = [self.data.cost(index) for index in packs]
        return rank_share(packs, costs, self.config.micro_batch_size, rank, ranks)

    def micro_batches(self, packs: list[int], following: list[int] | None) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a global batch, prefetching one, in the end the first of the `following` batch."""
        share = self.share(packs)
        upcoming = [*share[1:], self.share(following)[0] if following else None]
        for current, upcoming_one in zip(share, upcoming, strict=True):
            began = time.perf_counter()
            batch = (self.ahead[1] if self.ahead and self.ahead[0] == current else self._submit(current)).result()
            self.waited += time.perf_counter() - began
            self.ahead = (upcoming_one, self._submit(upcoming_one)) if upcoming_one else None
            beat()
            yield batch

    def _submit(self, packs: list[int]) -> Future:
        return self.thread.submit(self._make, packs)

    def _make(self, packs: list[int]) -> MicroBatch:
        batch = micro_batch(self.data.batch(packs), self.rank, self.ranks)
        # Pinned memory makes the copy to the GPU asynchronous.
        return batch.each(Tensor.pin_memory) if torch.cuda.is_available() else batch


def run_batch(
    state: TrainState, loader: Loader, packs: list[int], following: list[int] | None = None, forward_only: bool = False
) -> Tensor:
    """Forward and, unless `forward_only`, backward pass over a global batch.

    Returns:
        The tally over all ranks, without synchronization with the GPU.
    """
    config, chunks = loader.config, len(state.chunks)
    # Every chunk of an interleaved pipeline processes every micro-batch.
    copies = list(itertools.tee(loader.micro_batches(packs, following), chunks))
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=copies if chunks > 1 else copies[0],
        model=state.chunks,
        num_microbatches=len(loader.share(packs)),
        # The packs of a micro-batch are concatenated into a single row.
        seq_length=config.seq_length * config.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _over_all_ranks(results)


def _over_all_ranks(results: list[Tensor]) -> Tensor:
    # Only the last pipeline stage has results; they are replicated over tensor-parallel ranks.
    total = torch.zeros(SIZE, dtype=torch.float64, device=device())
    if results and parallel_state.get_tensor_model_parallel_rank() == 0:
        total = torch.stack(results).sum(dim=0)
    torch.distributed.all_reduce(total)
    return total
