"""Layer specs: megatron-core's for a config, with this kit's attention and MLP.

`transformer_config.py` converts a Hugging Face `config.json` into a TransformerConfig; here it becomes layers.
`get_gpt_decoder_block_spec` chooses Transformer Engine's modules or megatron-core's local ones. `block_spec` replaces
the core attention by one that separates the samples of a pack (`attention.py`), the MLP by one that saves less for the
backward pass, and the router of experts by one that counts tokens (`router.py`). To add another kind of layer, set it
in the TransformerConfig and put whatever megatron-core lacks into the spec in `block_spec`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import silu

from rsft_lib.model import engine
from rsft_lib.model.attention import TEAttention, TorchAttention
from rsft_lib.model.cpu_shim import fused
from rsft_lib.model.router import Router
from rsft_lib.model.shapes import LESS


def block_spec(backend: str, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, with modules of Transformer Engine ('te') or of megatron-core ('torch').

    Less is recomputed in the layers from `config.recompute_num_layers` on.
    """
    te = backend == "te"
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage)
    block.layer_specs = [copy.deepcopy(spec) for spec in block.layer_specs]  # megatron-core repeats one
    for number, spec in enumerate(block.layer_specs):
        layer, attention = spec.submodules, spec.submodules.self_attention.submodules
        attention.core_attention = TEAttention if te else TorchAttention
        engine.replace_dense_mlp(layer, LeanMLP)
        if experts := engine.moe_of(layer):
            experts.router = Router
            layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)  # the norm is not part of fc1
        granularity = config.recompute_granularity
        if granularity and number >= (config.recompute_num_layers or len(block.layer_specs)):
            spec.module, granularity = LessRecomputed, LESS[granularity]
        if te and granularity == "selective" and "layernorm" in config.recompute_modules:
            _separate_norm(layer)
        if not te:
            layer.input_layernorm = layer.pre_mlp_layernorm = block.layer_norm = Norm
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = Norm
    return block


class LessRecomputed(TransformerLayer):
    """A layer in which less is recomputed than its model's config says."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        config = copy.copy(config)
        config.recompute_granularity = LESS[config.recompute_granularity]
        super().__init__(config, *args, **kwargs)


def recomputed(config: TransformerConfig) -> list[str]:
    """megatron-core's names of the modules with selective activation recomputation."""
    return config.recompute_modules if config.recompute_granularity == "selective" else []


def _separate_norm(layer: TransformerLayerSubmodules) -> None:
    """Separate the norm before attention from the fused linear layer: only a separate norm can be recomputed."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.input_layernorm = TENorm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"


class Norm(torch.nn.RMSNorm):
    """torch's RMSNorm with support for sequence parallelism, which megatron-core's wrapper rejects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_):
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LeanMLP(MLP):
    """megatron-core's SwiGLU MLP, [t, 1, h] -> [t, 1, h], that recomputes its activation in the backward pass.

    Only the second linear layer needs the activation, [t, 1, f / TP], a third of what an MLP saves for the backward
    pass: 7.7 GiB in 28 layers with f = 8,960 at 16,384 tokens. Its memory is freed, and refilled before it is used.
    """

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, Tensor | None]:
        if "layernorm" in recomputed(self.config):
            return self._from_hidden_states(hidden_states)
        projected, _ = self.linear_fc1(hidden_states)  # [t, 1, 2 f / TP]
        activated = self._activate(projected)  # [t, 1, f / TP]
        output, bias = self.linear_fc2(activated)
        # Layers with full recomputation run twice anyway, and the FP8 linear layer saves its own copy.
        if output.requires_grad and not self.config.recompute_granularity and not self.config.fp8:
            _discard(activated, output, partial(_fill, projected.detach()))
        return output, bias

    def _from_hidden_states(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, but everything except the second linear layer is recomputed."""
        recomputation = CheckpointWithoutOutput(fp8=None)
        activated = recomputation.checkpoint(lambda x: self._activate(self.linear_fc1(x)[0]), hidden_states)
        output, bias = self.linear_fc2(activated)
        recomputation.discard_output_and_register_recompute(output)
        return output, bias

    def _activate(self, projected: Tensor) -> Tensor:
        return self.activation_func(projected) if self.config.use_te_activation_func else _fused_swiglu(projected)


def _discard(activated: Tensor, output: Tensor, fill: Callable[[Tensor], None]) -> None:
    """Free the memory of `activated`, and refill it with `fill` once the gradient of `output` is available.

    Works like megatron-core's `CheckpointWithoutOutput`, which needs a C++ compiler from 0.17 on.
    """
    size = activated.untyped_storage().nbytes()
    activated.untyped_storage().resize_(0)
    discarded = [(activated.data, fill)]  # autograd does not track changes of `data`

    def restore(_) -> None:
        if not discarded:  # a second backward pass through the same graph
            return
        restored, fill = discarded.pop()  # the hook outlives this call and must not keep them alive
        restored.untyped_storage().resize_(size)
        fill(restored)

    output.register_hook(restore)


def _swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return silu(gate) * up


_fused_swiglu = fused(_swiglu)


@fused
def _fill(projected: Tensor, activated: Tensor) -> None:
    activated.copy_(_swiglu(projected))
