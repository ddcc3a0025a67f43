"""Model FLOPs of training without activation recomputation, as in https://arxiv.org/abs/2205.05198.

Six per matmul parameter and token, including the output layer; attention counts half, since it is causal.
"""

from transformers import PretrainedConfig

from rsft_lib.model.config import head_dim
from rsft_lib.model.cpu_shim import gpu

# Dense bf16 FLOP/s from the vendor's datasheets; the first key contained in the device's name applies.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
    "L40S": 362e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip


def matmul_parameters(hf: PretrainedConfig) -> int:
    """Parameters used in matrix products: layers and output layer, without the embedding."""
    width, hidden = head_dim(hf), hf.hidden_size
    attention = hidden * width * (2 * hf.num_attention_heads + 2 * hf.num_key_value_heads)
    layer = attention + 3 * hidden * hf.intermediate_size
    return hf.num_hidden_layers * layer + hf.vocab_size * hidden


def parameters(hf: PretrainedConfig) -> int:
    """All parameters except norms and biases."""
    embedding = 0 if hf.tie_word_embeddings else hf.vocab_size * hf.hidden_size
    return matmul_parameters(hf) + embedding


def training_flops(hf: PretrainedConfig, tokens: float, squares: float) -> float:
    """FLOPs of forward and backward pass over `tokens` tokens; `squares` is the sum of squared sample lengths."""
    attention = hf.num_hidden_layers * hf.num_attention_heads * head_dim(hf) * squares
    return 6 * (matmul_parameters(hf) * tokens + attention)


def peak_flops() -> float | None:
    """Peak FLOP/s of this machine's GPU; None for a CPU or a GPU that is not in PEAKS."""
    device = gpu()
    return next((peak for part, peak in PEAKS.items() if part in device[0]), None) if device else None
