"""Model FLOPs of training without activation recomputation, as in https://arxiv.org/abs/2205.05198.

Six per matmul parameter and token, including the output layer; attention counts half, since it is causal. With experts,
the parameters are those that a token uses: the router, `num_experts_per_tok` experts and the shared one.
"""

from transformers import PretrainedConfig

from rsft_lib.common.device import gpu
from rsft_lib.model.config import head_dim
from rsft_lib.model.weight_map import expert_count, expert_size, shared_expert_size

# Dense bf16 FLOP/s from the vendor's datasheets; the first key contained in the device's name applies.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip


def matmul_parameters(hf: PretrainedConfig) -> int:
    """Parameters in the matrix products of a token: layers and output layer, without the embedding."""
    per_token = hf.num_experts_per_tok * one_expert(hf) if expert_count(hf) else 0
    return hf.num_hidden_layers * (_outside_experts(hf) + per_token) + hf.vocab_size * hf.hidden_size


def parameters(hf: PretrainedConfig) -> int:
    """All parameters except norms and biases."""
    matrices = 1 if hf.tie_word_embeddings else 2
    return layer_parameters(hf) * hf.num_hidden_layers + matrices * hf.vocab_size * hf.hidden_size


def layer_parameters(hf: PretrainedConfig) -> int:
    """Parameters of a layer except norms and biases, with all experts."""
    return _outside_experts(hf) + expert_count(hf) * one_expert(hf)


def one_expert(hf: PretrainedConfig) -> int:
    """Parameters of one expert of one layer."""
    return 3 * hf.hidden_size * expert_size(hf)


def _outside_experts(hf: PretrainedConfig) -> int:
    """Parameters of a layer that every token uses: attention, and the MLP, or router and shared expert."""
    attention = hf.hidden_size * head_dim(hf) * (2 * hf.num_attention_heads + 2 * hf.num_key_value_heads)
    if not expert_count(hf):
        return attention + 3 * hf.hidden_size * hf.intermediate_size
    shared = shared_expert_size(hf)
    return attention + hf.hidden_size * (expert_count(hf) + 3 * shared + (1 if shared else 0))


def training_flops(hf: PretrainedConfig, tokens: float, squares: float) -> float:
    """FLOPs of forward and backward pass over `tokens` tokens; `squares` is the sum of squared sample lengths."""
    return 6 * matmul_parameters(hf) * tokens + attention_flops(hf, squares)


def attention_flops(hf: PretrainedConfig, squares: float) -> float:
    """FLOPs of attention in all layers, forward and backward."""
    return 6 * hf.num_hidden_layers * hf.num_attention_heads * head_dim(hf) * squares


def layer_flops(hf: PretrainedConfig) -> tuple[float, float]:
    """FLOPs per token in the products of a layer, forward and backward: outside experts, and in a token's experts."""
    return 6 * _outside_experts(hf), 6 * hf.num_experts_per_tok * one_expert(hf) if expert_count(hf) else 0


def peak_flops() -> float | None:
    """Peak FLOP/s of this machine's GPU; None for a CPU or a GPU that is not in PEAKS."""
    device = gpu()
    return next((peak for part, peak in PEAKS.items() if part in device[0]), None) if device else None
