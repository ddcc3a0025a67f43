"""The trained model: megatron-core's GPTModel over packed samples, with a loss at trained positions only."""

import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig

from rsft_lib.model.attention import samples_of
from rsft_lib.model.config import attention_window, check_layout, padded_vocab_size
from rsft_lib.model.layers import block_spec
from rsft_lib.model.loss_head import Loss, Targets, weighted_loss
from rsft_lib.model.router import Router, routers
from rsft_lib.model.transformer_config import inverse_frequencies


def resolve_backend(backend: str, precision: str = "bf16") -> str:
    """Resolve 'auto' to 'te' or 'torch'; Transformer Engine has no fp32 attention over packed samples.

    Raises:
        ValueError: the name is unknown, or 'te' cannot run here.
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
    """GPTModel over packed samples that returns a `loss_head.Loss` for training.

    Args of a call:
        input_ids, position_ids: int64 [b, s]; positions restart with every sample.
        attention_mask: None; attention is causal within each sample.
        labels: `loss_head.Targets` for a loss; None returns logits [b, s, v / TP].
        samples: the `attention.Samples` of the whole micro-batch; None if every row is one sample.
        padding_mask: bool [b, s], True for padding, which routers of experts do not count.
        loss_weight: sum of the loss weights of the micro-batch on all context-parallel ranks, for the auxiliary loss.
    """

    tokens_in_vocabulary: int
    """Later rows of embedding and output layer are padding and excluded from the loss."""
    routers: tuple[Router, ...] = ()
    """Of the layers with experts."""
    watched: tuple[int, ...] = ()
    """Tokens whose log probability is returned at every target."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask=None, *, samples=None, loss_weight=1.0, **rest
    ):
        for router in self.routers:
            router.loss_weight = loss_weight
        if samples is not None:
            for_layers = {"attention_bias": samples}
            return super().forward(input_ids, position_ids, attention_mask, extra_block_kwargs=for_layers, **rest)
        rows, length = input_ids.shape
        samples = samples_of([length * i for i in range(rows + 1)], input_ids.device)
        positions = position_ids.expand(rows, -1).reshape(1, -1)
        logits = self.forward(input_ids.view(1, -1), positions, attention_mask, samples=samples, **rest)
        return logits.view(rows, length, -1) if self.post_process else logits

    # The methods below override private ones of megatron-core; their arguments differ between versions.

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, padding_mask: Tensor | None = None, **_) -> tuple:
        embedded = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = self.rotary_pos_emb(self.max_sequence_length, packed_seq=True)  # float32 [positions, 1, 1, d], cached
        if padding_mask is not None and self.config.sequence_parallel:
            group = self.pg_collection.tp
            padding_mask = padding_mask.chunk(group.size(), dim=1)[group.rank()]
        return embedded, angles[position_ids[0]], None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, labels: Targets | None = None, **rest) -> Tensor | Loss:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **rest)
        group, sequence = self.pg_collection.tp, self.config.sequence_parallel
        enter = gather_from_sequence_parallel_region if sequence else copy_to_tensor_model_parallel_region
        own = _gathered(self.output_layer).weight  # None if this stage has the embedding that it is tied to
        weight = self.shared_embedding_or_output_weight() if own is None else own
        hidden = enter(hidden_states).flatten(0, 1)  # [t, h]
        return weighted_loss(hidden, weight, labels, group, self.tokens_in_vocabulary, self.watched)


def _gathered(module: torch.nn.Module) -> torch.nn.Module:
    """Run the forward pre-hooks of a module whose parameters are used without calling it.

    With overlap_param_gather, DDP waits for a module's weights in such a hook.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, None)
    return module


def build_model(
    hf: PretrainedConfig, config: TransformerConfig, backend: str, max_length: int, vp_stage: int | None = None
) -> ResponseModel:
    """This rank's part of the model (virtual pipeline stage `vp_stage`, if any), with uninitialized weights.

    The vocabulary is padded to a multiple of the tensor-parallel size.

    Raises:
        ValueError: the model cannot be partitioned across the ranks, or its sliding window is below `max_length`.
    """
    parts, window = config.tensor_model_parallel_size, attention_window(hf)
    check_layout(
        hf, parts, config.pipeline_model_parallel_size, expert_parallel=config.expert_model_parallel_size,
        expert_tensor_parallel=config.expert_tensor_parallel_size,
    )  # fmt: skip
    if window is not None and window < max_length:
        raise ValueError(
            f"sequence length {max_length} exceeds the model's sliding_window={window}; set a shorter seq_length"
        )
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
    model.tokens_in_vocabulary, model.routers = hf.vocab_size, tuple(routers([model]))
    frequencies = inverse_frequencies(hf)
    if frequencies is not None:
        model.rotary_pos_emb.inv_freq = frequencies
    for module in model.modules():
        # Have Transformer Engine's layers accumulate weight gradients into DDP's buffers too. Set here, since
        # megatron-core would require Apex for the output layer if the config set it.
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            # Reduce gradients of experts among their own replicas; by default only if expert_parallel exceeds 1, which
            # is wrong if expert_tensor_parallel differs from tensor_parallel.
            parameter.allreduce = False
    return model
