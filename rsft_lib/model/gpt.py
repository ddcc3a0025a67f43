"""The model that is trained: megatron-core's GPTModel over packed samples, with a loss at trained positions only."""

import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from rsft_lib.model.attention import packed
from rsft_lib.model.config import attention_window, check_layout, inverse_frequencies, padded_vocab_size
from rsft_lib.model.layers import block_spec
from rsft_lib.model.loss_head import Loss, Targets, weighted_loss


def resolve_backend(backend: str, precision: str = "bf16") -> str:
    """'te' or 'torch' for 'auto', 'te' or 'torch'; Transformer Engine has no attention to packed samples in fp32.

    Raises:
        ValueError: the name is another, or 'te' is asked for where it cannot run.
    """
    available = (
        precision != "fp32" and torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    )
    if backend == "auto":
        return "te" if available else "torch"
    if backend not in ("te", "torch"):
        raise ValueError(f"backend is {backend!r}; choose 'auto', 'te' or 'torch'")
    if backend == "te" and not available:
        raise ValueError("backend 'te' needs a CUDA GPU and transformer-engine; install it or set backend='auto'")
    return backend


class ResponseModel(GPTModel):
    """GPTModel that is called with packed samples and, for training, returns a `loss_head.Loss`.

    Args of a call:
        input_ids, position_ids: int64 [b, s]; positions restart with every sample.
        attention_mask: None; attention is causal within each sample.
        labels: `loss_head.Targets` for a loss; without them the call returns logits [b, s, v / TP].
        samples: the `attention.Chunk`s of this rank; without them, every row is one sample.
    """

    tokens_in_vocabulary: int
    """The last rows of embedding and output layer may be padding; they take no part in the loss."""
    watched: tuple[int, ...] = ()
    """Words whose probability is reported at every target."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask=None, *, samples=None, **rest):
        if samples is not None:
            for_layers = {"attention_bias": samples}
            return super().forward(input_ids, position_ids, attention_mask, extra_block_kwargs=for_layers, **rest)
        rows, length = input_ids.shape
        samples = packed([length * i for i in range(rows + 1)], input_ids.device)
        positions = position_ids.expand(rows, -1).reshape(1, -1)
        logits = self.forward(input_ids.view(1, -1), positions, attention_mask, samples=samples, **rest)
        return logits.view(rows, length, -1) if self.post_process else logits

    # What follows overrides methods that megatron-core calls private, with arguments that differ between its versions.

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **_) -> tuple:
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = self.rotary_pos_emb(self.max_sequence_length, packed_seq=True)  # float32 [positions, 1, 1, d], cached
        return embedded, angles[position_ids[0]], None, None, None, None

    def _postprocess(self, hidden_states: Tensor, labels: Targets | None = None, **rest) -> Tensor | Loss:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **rest)
        group, sequence = self.pg_collection.tp, self.config.sequence_parallel
        enter = gather_from_sequence_parallel_region if sequence else copy_to_tensor_model_parallel_region
        own = _used(self.output_layer).weight  # none where a tied model's embedding is on this stage
        weight = self.shared_embedding_or_output_weight() if own is None else own
        hidden = enter(hidden_states).flatten(0, 1)  # [t, h]
        return weighted_loss(hidden, weight, labels, group, self.tokens_in_vocabulary, self.watched)


def _used(module: torch.nn.Module) -> torch.nn.Module:
    """`module`, whose parameters are about to be used without calling it.

    DDP, where it gathers weights while others compute, waits for those of a module in a hook of its call.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, None)
    return module


def build_model(
    hf: PretrainedConfig, config: TransformerConfig, backend: str, max_length: int, vp_stage: int | None = None
) -> ResponseModel:
    """This rank's part of the model, or its part number `vp_stage` of several, weights not yet loaded.

    The vocabulary is padded to divide over the tensor-parallel ranks.

    Raises:
        ValueError: the model does not divide over the ranks, or attends to fewer than `max_length` positions.
    """
    parts, window = config.tensor_model_parallel_size, attention_window(hf)
    check_layout(hf, parts, config.pipeline_model_parallel_size)
    if window is not None and window < max_length:
        raise ValueError(f"sequences of {max_length} are longer than the model's sliding_window {window}; shorten them")
    model = ResponseModel(
        config,
        block_spec(backend, config, vp_stage),
        vocab_size=padded_vocab_size(hf.vocab_size, parts),
        max_sequence_length=max_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=hf.rope_parameters["rope_theta"],
        vp_stage=vp_stage,
    )
    model.tokens_in_vocabulary = hf.vocab_size
    frequencies = inverse_frequencies(hf)
    if frequencies is not None:
        model.rotary_pos_emb.inv_freq = frequencies
    for module in model.modules():
        # By Transformer Engine's layers too, weight gradients are added where DDP keeps them. Said here, since
        # megatron-core, told so in its config, asks for Apex on behalf of the output layer.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    return model
