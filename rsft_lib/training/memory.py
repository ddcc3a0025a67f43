"""The memory of a training, counted from shapes."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from rsft_lib.model.config import head_dim
from rsft_lib.model.shapes import CHUNK, LESS, heads_of_rank
from rsft_lib.model.weight_map import expert_count, expert_size, shared_expert_size
from rsft_lib.training.config import CHOICES, TrainConfig
from rsft_lib.training.flops import layer_parameters, one_expert

OVERLAP_BUFFERS = 12  # that Transformer Engine allocates for `tensor_overlap`, outside of torch's memory
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one rank by purpose, from shapes; excludes fragmentation and CUDA's own memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def memory(config: TrainConfig, hf: PretrainedConfig, ranks: int) -> Memory:
    """Memory of the rank that needs most: the first or the last pipeline stage."""
    held, sharded = held_parameters(config, hf, ranks)
    moments = 2 * (2 if config.moments == "bf16" else 4)
    width = weight_bytes(config)
    tokens = config.seq_length * config.micro_batch_size / config.context_parallel
    vocabulary = hf.vocab_size / config.tensor_parallel
    saved, live = (values * tokens * width for values in _activations(config, hf))
    buffers = OVERLAP_BUFFERS * tokens * hf.hidden_size * width if config.tensor_overlap else 0
    loss = min(CHUNK, tokens) * vocabulary * width + 2 * tokens * hf.hidden_size * width
    # Transformer Engine keeps each weight of a layer in FP8 as well, by rows and by columns.
    copies = 2 * (held - _ends(config, hf)) if config.precision == "fp8" else 0
    return Memory(
        weights=held * width + copies,
        gradients=held * (2 if config.gradients == "bf16" else 4),
        optimizer=sharded * (moments + (2 if config.precision != "fp32" else 0)),
        activations=saved + live + buffers,
        loss=max(0.0, loss - live),  # it is over when the backward pass of the layers begins
    )


def held_parameters(config: TrainConfig, hf: PretrainedConfig, ranks: int) -> tuple[float, float]:
    """Parameters on the rank that has most, and those among them that its optimizer updates."""
    tensor, pipeline, context = config.tensor_parallel, config.pipeline_parallel, config.context_parallel
    experts = hf.num_hidden_layers * expert_count(hf) * one_expert(hf)
    layers = hf.num_hidden_layers * layer_parameters(hf) - experts
    held = layers / pipeline / tensor + _ends(config, hf)
    across = pipeline * config.expert_parallel * config.expert_tensor_parallel
    shards = config.data_parallel(ranks) * context
    return held + experts / across, held / shards + experts / across / (ranks // across)


def _ends(config: TrainConfig, hf: PretrainedConfig) -> float:
    """Parameters of embedding and output layer on a rank; they are on one rank without pipeline parallelism."""
    matrices = 1 if config.pipeline_parallel > 1 or hf.tie_word_embeddings else 2
    return matrices * hf.vocab_size * hf.hidden_size / config.tensor_parallel


def _activations(config: TrainConfig, hf: PretrainedConfig) -> tuple[float, float]:
    """Values per token that a rank saves for the backward pass, and those that the backward pass of a layer adds."""
    across = config.tensor_parallel if config.sequence_parallel else 1
    hidden, inner = hf.hidden_size / across, 2 * hf.intermediate_size / config.tensor_parallel
    heads, groups = (
        n * head_dim(hf) / config.tensor_parallel for n in (hf.num_attention_heads, hf.num_key_value_heads)
    )
    attention = 2 * (heads + groups)
    if config.context_parallel > 1:
        # Attention saves its own copies, for all tokens and some heads; groups may be on several ranks.
        _, repeated = context_parallel_width(config, hf)
        attention += heads + 2 * (repeated - groups)
    kept = 0.0  # by the MLP with selective recomputation
    # Activation, its gradient and that of the products before it; what is recomputed is there as well.
    live = {"none": 2 * inner, "selective": hidden + 3.3 * inner, "full": 2.5 * inner}[config.recompute]
    if expert_count(hf):
        # Inputs, the two products and the activation of each chosen expert; the last is what is recomputed.
        sizes = (hf.hidden_size + 2 * expert_size(hf), expert_size(hf))
        chosen, activation = (hf.num_experts_per_tok * size / across for size in sizes)
        kept = chosen + 3 * shared_expert_size(hf) / config.tensor_parallel
        inner = kept + activation
        live = 1.5 * inner + 4 * hidden
    # Residuals, and the outputs of norms, which `selective` recomputes.
    layer = {"none": 4 * hidden + attention + inner, "selective": 2 * hidden + attention + kept, "full": hidden}
    if config.precision == "fp8":
        # Inputs of products are kept in FP8, besides attention's output and in place of those of norms.
        layer["none"] += heads / 2 + inner / 4 - hidden
        layer["selective"] += heads / 2 + hidden / 2
    saved = sum(share * layer[kind] for kind, share in recomputed_shares(config, hf).items())
    saved *= hf.num_hidden_layers / config.pipeline_parallel
    if config.pipeline_parallel > 1:
        saved *= config.pipeline_parallel * (1 + (config.virtual_pipeline > 1))  # micro-batches of the first stage
    again = 4 * hidden + attention + (inner if expert_count(hf) else 0) if config.recompute == "full" else 0
    return saved, live + again


def recomputed_shares(config: TrainConfig, hf: PretrainedConfig) -> dict[str, float]:
    """Share of the layers with each kind of recomputation: `recompute` in some, the one below it in the others."""
    stage = hf.num_hidden_layers / (config.pipeline_parallel * config.virtual_pipeline)
    share = min(1.0, config.recompute_layers / stage) if config.recompute_layers else 1.0
    others = LESS.get(config.recompute) or "none"
    return dict.fromkeys(CHOICES["recompute"], 0.0) | {others: 1 - share} | {config.recompute: share}


def context_parallel_width(config: TrainConfig, hf: PretrainedConfig) -> tuple[float, float]:
    """Width of the heads, and of the keys, per token of a context-parallel rank, with padded heads and repeated groups.

    Without context parallelism, those of a tensor-parallel rank.
    """
    heads, groups = (max(1, n // config.tensor_parallel) for n in (hf.num_attention_heads, hf.num_key_value_heads))
    own, own_groups = heads_of_rank(heads, groups, config.context_parallel)
    width = config.context_parallel * head_dim(hf)
    return own * width, own_groups * width


def weight_bytes(config: TrainConfig) -> int:
    """Bytes per weight."""
    return 4 if config.precision == "fp32" else 2
