"""The branches between megatron-core 0.16.1, the last version for Python 3.11, and 0.19.2 for later Pythons."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

VERSION = version("megatron-core")


def _copy_memory(output: Tensor, recomputed: Tensor) -> None:
    storage, source = output.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _share_or_copy() -> Callable[[Tensor, Tensor], None]:
    """The function that restores a discarded output from its recomputation.

    0.16 copies. 0.19 shares the new memory through C++ that is compiled on first use: it saves 3 ms of a micro-batch
    of 420 ms on a GPU, and nothing on a CPU.
    """
    if _share is not None and torch.cuda.is_available():
        with suppress(ImportError, OSError, RuntimeError):  # no compiler, no ninja or no build folder
            return _share()
    return _copy_memory


_share = getattr(megatron_random, "_get_share_storage", None)
megatron_random._get_share_storage = _share_or_copy


def prepare_recomputation() -> None:
    """Compile now what the first backward pass would compile, where the hang timeout is shorter."""
    if _share is not None:
        _share_or_copy()


def replace_dense_mlp(layer: TransformerLayerSubmodules, mlp: type[MLP]) -> None:
    """Replace megatron-core's MLP by `mlp` in a layer's spec; experts are unchanged."""
    spec = layer.mlp
    if isinstance(spec, ModuleSpec):  # 0.16
        if spec.module is MLP:
            spec.module = mlp
    elif spec.func == MLP.as_mlp_submodule:
        layer.mlp = partial(mlp.as_mlp_submodule, *spec.args, **spec.keywords)


def moe_of(layer: TransformerLayerSubmodules) -> MoESubmodules | None:
    """The modules of a layer with experts, in the layer's spec; None for a dense layer."""
    spec = layer.mlp
    if isinstance(spec, ModuleSpec):  # 0.16
        return spec.submodules if spec.module is MoELayer else None
    return spec.keywords["submodules"] if spec.func is MoELayer else None


if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16 without Transformer Engine does not define it, and asks whether it is None


def _norm(_chunk_size, _overflow, tensors: list[list[Tensor]], _per_tensor: bool) -> tuple[Tensor, None]:
    """The L2 norm of all tensors, float32 [1]."""
    return torch.stack(torch._foreach_norm(tensors[0])).norm().view(1), None


if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
    # Without Transformer Engine, and in 0.19 with a version older than its `multi_tensor_scale_tensor`, megatron-core
    # waits for the GPU once per tensor.
    clip_grads.l2_norm_impl = _norm
