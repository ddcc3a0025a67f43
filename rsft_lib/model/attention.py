"""Attention without Transformer Engine: torch's scaled_dot_product_attention, packed samples kept apart."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class TorchAttention(torch.nn.Module):
    """Causal self-attention in place of megatron-core's `DotProductAttention`, with the same call.

    megatron-core's own module knows no packed samples and wants a CUDA random generator.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs backend 'te'; set context_parallel_size to 1")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: PackedSeqParams | None = None,
        **_,
    ) -> Tensor:
        """Attend within each sample.

        Args:
            query: [s, b, heads, d], or [t, heads, d] when packed.
            key, value: the same with the number of query groups for heads.
            attention_mask: must be None; the mask is causal.
            packed_seq_params: `cu_seqlens_q` says where each sample of a pack begins and ends.

        Returns:
            [s, b, heads * d], or [t, heads * d] when packed.
        """
        assert attention_mask is None, "the mask is causal"
        if packed_seq_params is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
            return _causal(q, k, v).permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        samples = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([_causal(*sample).transpose(0, 1) for sample in samples]).flatten(1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
