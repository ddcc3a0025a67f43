"""Process groups of a run: data-, tensor-, pipeline-, context- and expert-parallel."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel

from rsft_lib.model.cpu_shim import cuda_on_cpu


@contextmanager
def ranks(
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    seed: int = 0,
    *,
    context_parallel_size: int = 1,
    virtual_pipeline_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    timeout: int = 600,
) -> Iterator[None]:
    """Initialize the process groups of the ranks that torchrun started, or of a single rank, within the block.

    The backend is NCCL on GPUs and gloo on CPUs.

    Args:
        timeout: seconds after which a collective fails; ranks also wait in one while another reads or writes files.
    """
    with cuda_on_cpu():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        alone = (
            {} if "WORLD_SIZE" in os.environ else {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
        )
        torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout), **alone)
        try:
            parallel_state.initialize_model_parallel(
                tensor_parallel_size,
                pipeline_parallel_size,
                virtual_pipeline_size if virtual_pipeline_size > 1 else None,
                context_parallel_size=context_parallel_size,
                expert_model_parallel_size=expert_parallel_size,
                expert_tensor_parallel_size=expert_tensor_parallel_size,
                distributed_timeout_minutes=-(-timeout // 60),
            )
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
