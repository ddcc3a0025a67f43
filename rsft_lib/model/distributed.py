"""Process groups of a run: data-, tensor-, pipeline-, context- and expert-parallel."""

import importlib
import os
import sys
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
            _free_overlap_buffers()
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


TE_BUFFERS = "transformer_engine.pytorch.module.base"


def allocate_overlap_buffers(tokens: int, hidden_size: int, tensor_parallel_size: int, fp8: bool) -> None:
    """Allocate Transformer Engine's user buffers, in which ranks exchange parts of a matrix while they multiply others.

    Twelve of [tokens, hidden_size], one per linear layer, product and direction; all layers of the model and all stages
    of a pipeline share them. Collective over all ranks. Consecutive ranks are tensor-parallel and on one machine; every
    forward pass has `tokens` tokens.

    Args:
        tokens: of a micro-batch on a context-parallel rank, over all tensor-parallel ranks.
        fp8: whether products are in FP8, so that what is gathered has a byte per value.
    """
    te = importlib.import_module(TE_BUFFERS)
    mode = te.UserBufferQuantizationMode.FP8 if fp8 else te.UserBufferQuantizationMode.NONE
    te.initialize_ub([tokens, hidden_size], tensor_parallel_size, quantization_modes=[mode], bootstrap_backend="gloo")


def _free_overlap_buffers() -> None:
    if te := sys.modules.get(TE_BUFFERS):
        te.destroy_ub()
