"""Run megatron-core on a machine without CUDA.

megatron-core hard-codes CUDA in many places although all of its arithmetic runs on a CPU. Within `cuda_on_cpu()` these
calls use the CPU. With CUDA, nothing is changed.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from megatron.core.jit import jit_fuser
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from torch.overrides import TorchFunctionMode


def fused(function):
    """Compile `function` into one kernel for a first argument on a GPU; otherwise run it eagerly."""
    compiled = jit_fuser(function)

    @functools.wraps(function)
    def wrapped(first: torch.Tensor, *rest):
        return compiled(first, *rest) if first.is_cuda else function(first, *rest)

    return wrapped


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces a CUDA device by the CPU in every torch function call; `Tensor.cuda()` is the identity."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DDP and the optimizers sort parameters by these names.
            return function(*args).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return function(*args, **kwargs)


def _is_cuda(target) -> bool:
    # megatron-core also passes torch.cuda.current_device(), a bare int.
    return isinstance(target, int) or str(target).startswith("cuda")


class _Stream:
    """Stub of `torch.cuda.Stream`; a class, since type annotations use it."""

    def __init__(self, *_, **__):
        pass

    wait_stream = synchronize = wait_event = lambda self, *_: None
    record_event = lambda self, *_: self  # noqa: E731  # an event, which can be waited for too


def _on_the_cpu(tensor: torch.Tensor | None, as_numpy: bool = False, record_stream: bool = False):
    """The token dispatcher's copy from the GPU, which does not make arrays of tensors that are on the CPU already."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Let megatron-core run on this machine, with or without CUDA; enter it once, around all of its calls."""
    if torch.cuda.is_available():
        yield
        return
    for method in vars(torch.optim.Optimizer).values():
        # These import torch's compiler only to disable it for themselves: a tenth of a rank's startup time, and an
        # error within the mode below.
        if hasattr(method, "__wrapped__"):
            method.__wrapped__.__dynamo_disable = method.__wrapped__
    nothing = lambda *_, **__: None  # noqa: E731
    stand_ins = mock.patch.multiple(
        torch.cuda,
        # Not 0: the mode, which maps 0 to the CPU, is not active in the backward pass.
        current_device=lambda: torch.device("cpu"),
        set_device=nothing,
        synchronize=nothing,
        empty_cache=nothing,
        current_stream=lambda *_: _Stream(),
        default_stream=lambda *_: _Stream(),
        Stream=_Stream,
        stream=lambda *_: nullcontext(),
        manual_seed=nothing,
        get_rng_state=lambda *_: torch.empty(0, dtype=torch.uint8),
        set_rng_state=nothing,
        is_current_stream_capturing=lambda: False,
    )
    ranges = mock.patch.multiple(torch.cuda.nvtx, range_push=nothing, range_pop=nothing)
    generators = mock.patch.multiple(megatron_random, _get_cuda_rng_state=nothing, _set_cuda_rng_state=nothing)
    copies = mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _on_the_cpu)
    with stand_ins, ranges, generators, copies, _CudaMeansCpu():
        yield
