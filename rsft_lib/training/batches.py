"""One global batch through the model: this rank's share of it, and what all ranks counted."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rsft_lib.data.packed import PackedDataset, rank_share
from rsft_lib.host import device
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loss import MicroBatch, forward_step, micro_batch
from rsft_lib.training.state import TrainState
from rsft_lib.training.tally import SIZE
from rsft_lib.training.watchdog import beat


def run_batch(
    state: TrainState, config: TrainConfig, data: PackedDataset, packs: list[int], forward_only: bool
) -> tuple[list[float], float]:
    """Forward, and backward, over one global batch: (its tally over all ranks, seconds of waiting for tensors)."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = rank_share(packs, [data.cost(index) for index in packs], config.micro_batch_size, rank, ranks)
    batches = _Batches(data, share)
    chunks = len(state.chunks)
    copies = list(itertools.tee(batches, chunks))  # every chunk of an interleaved pipeline sees every micro-batch
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=copies if chunks > 1 else copies[0],
        model=state.chunks,
        num_microbatches=len(share),
        # The packs of a micro-batch lie one after the other in a single row.
        seq_length=config.seq_length * config.micro_batch_size,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _over_all_ranks(results), batches.waited


class _Batches:
    """A rank's micro-batches, each made by a thread while the one before is computed."""

    def __init__(self, data: PackedDataset, share: list[list[int]]):
        self.data, self.share, self.waited = data, share, 0.0
        self.rank = parallel_state.get_context_parallel_rank()
        self.ranks = parallel_state.get_context_parallel_world_size()

    def __iter__(self) -> Iterator[MicroBatch]:
        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(self._make, self.share[0])
            for following in [*self.share[1:], None]:
                began = time.perf_counter()
                batch = upcoming.result()
                self.waited += time.perf_counter() - began
                if following is not None:
                    upcoming = thread.submit(self._make, following)
                beat()
                yield batch

    def _make(self, packs: list[int]) -> MicroBatch:
        batch = micro_batch(self.data.batch(packs), self.rank, self.ranks)
        # From pinned memory the GPU fetches it without the CPU waiting for what runs.
        return batch.each(Tensor.pin_memory) if torch.cuda.is_available() else batch


def _over_all_ranks(results: list[Tensor]) -> list[float]:
    # Only last pipeline stages have results; tensor-parallel ranks all have the same ones.
    total = torch.zeros(SIZE, dtype=torch.float64, device=device())
    if results and parallel_state.get_tensor_model_parallel_rank() == 0:
        total = torch.stack(results).sum(dim=0)
    torch.distributed.all_reduce(total)
    return total.tolist()
