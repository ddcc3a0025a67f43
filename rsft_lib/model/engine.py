"""What differs between megatron-core 0.16.1, the last for Python 3.11, and 0.19.2, for later ones; nowhere else."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

VERSION = version("megatron-core")


def _copy_memory(output: Tensor, again: Tensor) -> None:
    storage, source = output.untyped_storage(), again.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _share_or_copy() -> Callable[[Tensor, Tensor], None]:
    """How an output that was given back gets its memory again, once it is computed again.

    0.16 copies. 0.19 hands the new memory over, by C++ that is compiled when it is first asked for: on a GPU 3 ms of
    a micro-batch of 420, on a CPU nothing but the wait.
    """
    if torch.cuda.is_available():
        with suppress(ImportError, OSError, RuntimeError):  # no compiler, no ninja, no folder for what is compiled
            return _share()
    return _copy_memory


_share = getattr(megatron_random, "_get_share_storage", None)
megatron_random._get_share_storage = _share_or_copy


def prepare_recomputation() -> None:
    """Compile now what the first backward pass would compile, in which nobody waits for it as long."""
    if _share is not None:
        _share_or_copy()


def replace_dense_mlp(layer: TransformerLayerSubmodules, mlp: type[MLP]) -> None:
    """Have a layer's spec build `mlp` where it would build megatron-core's MLP; experts stay as they are."""
    spec = layer.mlp
    if isinstance(spec, ModuleSpec):  # 0.16
        if spec.module is MLP:
            spec.module = mlp
    elif spec.func == MLP.as_mlp_submodule:
        layer.mlp = partial(mlp.as_mlp_submodule, *spec.args, **spec.keywords)


def plan_save(sharded: dict, folder: Path, threads: int) -> AsyncRequest:
    """Decide which rank writes which tensor of a `torch_dist` checkpoint; `threads` files a rank.

    The default of 0.19 is a package that is no dependency of it.
    """
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=threads)
    return strategy.async_save(sharded, folder, *([] if VERSION.startswith("0.16") else ["mcore"]))
