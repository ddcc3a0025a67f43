"""One transformer layer on megatron-core's modules, with the arithmetic of `functions.py`.

megatron-core still holds the parameters, splits them over ranks and names them in checkpoints; the names are those of
its Transformer Engine layer, so that checkpoints of both are alike.
"""

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from rsft_lib.model.functions import Linear, Mlp, Norm, NormLinear, Rotate, Rows, SwiGlu, TensorParallel


def fused_layer(core_attention: type, qk_layernorm: bool) -> ModuleSpec:
    """The specification of one layer; `core_attention` is a module of `attention.py`."""
    qk_norm = RmsNorm if qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=NormColumnLinear,
        core_attention=core_attention,
        linear_proj=RowLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(PackedAttention, {"attn_mask_type": AttnMaskType.causal}, attention),
            self_attn_bda=_add,
            mlp=FusedMlp,
            mlp_bda=_keep,
        ),
    )


def fp8_layer(spec: ModuleSpec, core_attention: type) -> ModuleSpec:
    """Transformer Engine's layer, whose products can be FP8, with the attention and the arithmetic of this kit."""
    layer, attention = spec.submodules, spec.submodules.self_attention
    attention.module, attention.submodules.core_attention = PackedAttention, core_attention
    layer.mlp = type("TEMlp", (PlainMlp,), {"products": layer.mlp.submodules})
    layer.self_attn_bda = layer.mlp_bda = _add
    return spec


class RmsNorm(torch.nn.Module):
    """A norm by itself, after the last layer or of each query's and key's head: [..., h] -> [..., h]."""

    def __init__(self, config, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return Norm.apply(x.flatten(0, -2), self.weight, self.eps).view_as(x)


class NormColumnLinear(ColumnParallelLinear):
    """A norm and the product after it: [t, 1, h] -> [t, 1, o / TP], and the input for whoever adds it later."""

    def __init__(self, input_size: int, output_size: int, *, config, **rest):
        super().__init__(input_size, output_size, config=config, **rest)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones_like(self.weight[0]))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.parallel = TensorParallel(self.tp_group, config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, past = NormLinear.apply(
            x.flatten(0, 1),
            self.layer_norm_weight,
            self.weight,
            self.bias,
            self.config.layernorm_epsilon,
            self.parallel,
            self.config.recompute_granularity == "selective",
        )
        return rows.unsqueeze(1), past.unsqueeze(1)


class RowLinear(RowParallelLinear):
    """[t, 1, i / TP] -> [t, 1, h]."""

    def __init__(self, input_size: int, output_size: int, *, config, **rest):
        super().__init__(input_size, output_size, config=config, **rest)
        self.parallel = TensorParallel(self.tp_group, config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return Linear.apply(x.flatten(0, 1), self.weight, self.parallel).unsqueeze(1), None


class FusedMlp(MLP):
    """Norm, gated MLP and the residual in one: [t, 1, h] -> [t, 1, h]."""

    def __init__(self, config):
        products = MLPSubmodules(linear_fc1=NormColumnLinear, linear_fc2=RowLinear)
        super().__init__(config, products, ffn_hidden_size=config.ffn_hidden_size)
        self.recompute = config.recompute_granularity == "selective"

    def forward(self, x: Tensor, **_) -> tuple[Tensor, None]:
        first, second = used(self.linear_fc1), used(self.linear_fc2)
        rows = Mlp.apply(
            x.flatten(0, 1), first.layer_norm_weight, first.weight, second.weight,
            self.config.layernorm_epsilon, first.parallel, self.recompute,
        )  # fmt: skip
        return rows.unsqueeze(1), None


class PlainMlp(MLP):
    """Norm and gated MLP from modules that do their own products: [t, 1, h] -> [t, 1, h]."""

    products: MLPSubmodules

    def __init__(self, config):
        super().__init__(config, self.products, ffn_hidden_size=config.ffn_hidden_size)

    def forward(self, x: Tensor, **_) -> tuple[Tensor, None]:
        projected, _ = self.linear_fc1(x)
        rows = SwiGlu.apply(projected.flatten(0, 1))
        output, _ = self.linear_fc2(rows.unsqueeze(1))
        return output, None


class PackedAttention(SelfAttention):
    """Self-attention over the samples of a pack, [t, 1, h] -> [t, 1, h], with one rotary position per token."""

    def forward(
        self, hidden_states: Tensor, attention_mask: None, rotary_pos_emb=None, packed_seq_params=None, **_
    ) -> tuple[Tensor, Tensor | None]:
        """`rotary_pos_emb`: float32 [2, t, d / 2], cosine and sine; `packed_seq_params`: `attention.Packed`.

        The last layer gives the rows that are wanted only, [n, 1, h].
        """
        qkv, past = self.linear_qkv(hidden_states)
        qkv = self._own_heads(qkv).view(qkv.shape[0], self.num_query_groups_per_partition, -1, self.key_hidden_size)
        if not isinstance(self.q_layernorm, IdentityOp):
            query, key, value = qkv.split([qkv.shape[2] - 2, 1, 1], dim=2)
            qkv = torch.cat([self.q_layernorm(query.contiguous()), self.k_layernorm(key.contiguous()), value], dim=2)
        query, key, value = Rotate.apply(qkv, rotary_pos_emb, self.num_query_groups_per_partition)
        mixed = self.core_attention(query, key, value, packed_seq_params)  # [t, heads * d]
        wanted = packed_seq_params.wanted
        if wanted is not None and self.layer_number == self.config.num_layers:
            mixed, past = Rows.apply(mixed, wanted), Rows.apply(past, wanted)  # [n, ...]: nothing mixes rows after this
        output, _ = self.linear_proj(mixed.unsqueeze(1))
        return output, past

    def _own_heads(self, qkv: Tensor) -> Tensor:
        """Where tensor-parallel ranks are more than query groups, each takes its queries of a group that they share."""
        sharing = self.world_size // self.config.num_query_groups
        if sharing <= 1:
            return qkv
        rank = self.tp_group.rank()
        whole = all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.tp_group)
        group = whole.chunk(self.config.num_query_groups, dim=-1)[rank // sharing]
        query, key_value = group.split([group.shape[-1] - 2 * self.key_hidden_size, 2 * self.key_hidden_size], dim=-1)
        return torch.cat([query.chunk(sharing, dim=-1)[rank % sharing], key_value], dim=-1)


def used(module: torch.nn.Module) -> torch.nn.Module:
    """`module`, whose parameters are about to be used without calling it.

    DDP, where it gathers weights while others compute, waits for those of a module in a hook of its call.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, None)
    return module


def _add(training: bool, fused: bool):
    """Adds the residual: where attention hands on its input, that, so that the norm's backward pass adds gradients."""
    return lambda x_with_past, residual, dropout: (
        x_with_past[0] + (residual if x_with_past[1] is None else x_with_past[1])
    )


def _keep(training: bool, fused: bool):
    """In place of adding the residual, which `FusedMlp` has done."""
    return lambda x_with_past, residual, dropout: x_with_past[0]
