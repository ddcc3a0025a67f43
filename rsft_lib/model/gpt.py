"""The model that is trained: megatron-core's GPTModel with a loss over the trained tokens only."""

import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import ModuleSpec, TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from rsft_lib.model.attention import TorchAttention
from rsft_lib.model.config import attention_window, check_layout, inverse_frequencies, padded_vocab_size

LOSS_CHUNK = 1024  # trained tokens whose logits exist at one time


def resolve_backend(backend: str) -> str:
    """'te' or 'torch' for 'auto', 'te' or 'torch'.

    Raises:
        ValueError: the name is another, or 'te' is asked for where it cannot run.
    """
    available = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if backend == "auto":
        return "te" if available else "torch"
    if backend not in ("te", "torch"):
        raise ValueError(f"backend is {backend!r}; choose 'auto', 'te' or 'torch'")
    if backend == "te" and not available:
        raise ValueError("backend 'te' needs a CUDA GPU and transformer-engine; install it or set backend='auto'")
    return backend


def layer_spec(backend: str, qk_layernorm: bool) -> ModuleSpec:
    """One transformer layer built from Transformer Engine ('te') or plain PyTorch ('torch') modules."""
    if backend == "te":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = TorchAttention
    return spec


class ResponseModel(GPTModel):
    """GPTModel whose loss is computed at the trained positions only.

    Called with `labels` [b, s] and `loss_mask` [b, s] it returns the float32 loss of each trained token,
    [trained tokens]; without them, logits as GPTModel does. No [s, vocabulary] tensor is ever whole.
    The last rows of the vocabulary may be padding; they take no part in the loss.
    """

    tokens_in_vocabulary: int

    def _postprocess(self, hidden_states: Tensor, labels=None, loss_mask=None, **rest) -> Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **rest)
        trained = loss_mask.bool()
        # hidden_states: [s, b, h]
        return self._token_losses(hidden_states.transpose(0, 1)[trained], labels[trained])

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[n, h] and [n] -> [n]; the logits of a chunk are computed again in the backward pass."""
        if len(labels) <= LOSS_CHUNK:
            return self._chunk_losses(hidden, labels)
        chunks = zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True)
        return torch.cat([checkpoint(self._chunk_losses, *chunk, use_reentrant=False) for chunk in chunks])

    def _chunk_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden.unsqueeze(1), weight=weight)  # [n, 1, vocabulary / TP]
        return vocab_parallel_cross_entropy(self._without_padding(logits), labels.unsqueeze(1)).squeeze(1)

    def _without_padding(self, logits: Tensor) -> Tensor:
        """[..., vocabulary / TP] with probability 0 for this rank's rows of padding."""
        width = logits.shape[-1]
        tokens = self.tokens_in_vocabulary - parallel_state.get_tensor_model_parallel_rank() * width
        if tokens >= width:
            return logits
        return logits.masked_fill(torch.arange(width, device=logits.device) >= tokens, float("-inf"))


def build_model(hf: PretrainedConfig, config: TransformerConfig, backend: str, max_length: int) -> ResponseModel:
    """This rank's part of the model, weights not yet loaded; its vocabulary is padded to divide over the ranks.

    Raises:
        ValueError: the model does not divide over the ranks, or attends to fewer than `max_length` positions.
    """
    parts, window = config.tensor_model_parallel_size, attention_window(hf)
    check_layout(hf, parts, config.pipeline_model_parallel_size)
    if window is not None and window < max_length:
        raise ValueError(f"sequences of {max_length} are longer than the model's sliding_window {window}; shorten them")
    model = ResponseModel(
        config,
        layer_spec(backend, config.qk_layernorm),
        vocab_size=padded_vocab_size(hf.vocab_size, parts),
        max_sequence_length=max_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_parameters["rope_theta"],
    )
    model.tokens_in_vocabulary = hf.vocab_size
    frequencies = inverse_frequencies(hf)
    if frequencies is not None:
        model.rotary_pos_emb.inv_freq = frequencies
    return model
