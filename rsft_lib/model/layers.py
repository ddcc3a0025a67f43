"""The layers of a model, as megatron-core specifies them for a config, and what of them is this kit's own.

A Hugging Face `config.json` becomes a TransformerConfig in `config.py`, and that becomes layers here:
`get_gpt_decoder_block_spec` names Transformer Engine's modules on a GPU that has them and megatron-core's local ones
elsewhere. Put in their place are a core attention that keeps the samples of a pack apart (`attention.py`) and an MLP
that keeps less for the backward pass. A layer of a new kind, as experts are, comes from megatron-core with its setting
in the TransformerConfig; what megatron-core lacks for it is put into its spec in `block_spec`.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import silu

from rsft_lib.model import engine
from rsft_lib.model.attention import TEAttention, TorchAttention
from rsft_lib.model.cpu_shim import fused


def block_spec(backend: str, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, with modules of Transformer Engine ('te') or of megatron-core ('torch')."""
    te = backend == "te"
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=te, normalization="RMSNorm", vp_stage=vp_stage)
    for layer in (spec.submodules for spec in block.layer_specs):
        attention = layer.self_attention.submodules
        attention.core_attention = TEAttention if te else TorchAttention
        engine.replace_dense_mlp(layer, LeanMLP)
        if te and "layernorm" in recomputed(config):
            _separate_norm(layer)
        if not te:
            layer.input_layernorm = layer.pre_mlp_layernorm = block.layer_norm = Norm
            if config.qk_layernorm:
                attention.q_layernorm = attention.k_layernorm = Norm
    return block


def recomputed(config: TransformerConfig) -> list[str]:
    """What megatron-core calls the modules that are computed again in the backward pass."""
    return config.recompute_modules if config.recompute_granularity == "selective" else []


def _separate_norm(layer: TransformerLayerSubmodules) -> None:
    """Take the norm before attention out of the product after it: only a norm by itself can be computed again."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.input_layernorm = TENorm
    layer.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    layer.sharded_state_dict_keys_map["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"


class Norm(torch.nn.RMSNorm):
    """torch's, marked for sequence parallelism, with which megatron-core's wrapper of it refuses to work."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_):
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LeanMLP(MLP):
    """megatron-core's SwiGLU MLP, [t, 1, h] -> [t, 1, h], that computes its activation again in the backward pass.

    The second product alone keeps the activation, [t, 1, f / TP], half as much as all else that an MLP keeps: 7.7 GiB
    in 28 layers of 8,960 at 16,384 tokens. So its memory is given back, and filled again before it is used.
    """

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, Tensor | None]:
        if "layernorm" in recomputed(self.config):
            return self._from_hidden_states(hidden_states)
        projected, _ = self.linear_fc1(hidden_states)  # [t, 1, 2 f / TP]
        activated = self._activate(projected)  # [t, 1, f / TP]
        output, bias = self.linear_fc2(activated)
        # Recomputed layers are run twice as they are, and FP8's product keeps a copy of its own.
        if output.requires_grad and not self.config.recompute_granularity and not self.config.fp8:
            _discard(activated, output, partial(_fill, projected.detach()))
        return output, bias

    def _from_hidden_states(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, with all but the second product computed again."""
        again = CheckpointWithoutOutput(fp8=None)
        activated = again.checkpoint(lambda x: self._activate(self.linear_fc1(x)[0]), hidden_states)
        output, bias = self.linear_fc2(activated)
        again.discard_output_and_register_recompute(output)
        return output, bias

    def _activate(self, projected: Tensor) -> Tensor:
        return self.activation_func(projected) if self.config.use_te_activation_func else _fused_swiglu(projected)


def _discard(activated: Tensor, output: Tensor, fill: Callable[[Tensor], None]) -> None:
    """Free the memory of `activated` until the gradient of `output` is there, and have `fill` fill it again.

    As megatron-core's `CheckpointWithoutOutput` does it, which from 0.17 on needs a C++ compiler on the machine.
    """
    size = activated.untyped_storage().nbytes()
    activated.untyped_storage().resize_(0)
    kept = [(activated.data, fill)]  # autograd takes no change of `data` for one

    def restore(_) -> None:
        if not kept:  # of a graph that is gone through once more
            return
        again, fill = kept.pop()  # the hook lives to the end of the backward pass; what it needed should not
        again.untyped_storage().resize_(size)
        fill(again)

    output.register_hook(restore)


def _swiglu(projected: Tensor) -> Tensor:
    gate, up = projected.chunk(2, dim=-1)
    return silu(gate) * up


_fused_swiglu = fused(_swiglu)


@fused
def _fill(projected: Tensor, activated: Tensor) -> None:
    activated.copy_(_swiglu(projected))
