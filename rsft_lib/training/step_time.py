"""The time of a training step, predicted from counted FLOPs and bytes and from a machine's rates."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from rsft_lib.model.config import head_dim
from rsft_lib.model.weight_map import expert_count
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.flops import attention_flops, layer_flops
from rsft_lib.training.memory import context_parallel_width, held_parameters, recomputed_shares
from rsft_lib.training.rates import Rates

FP8_PRODUCTS = 1.8  # speed of products in FP8 over that in bf16
FP8_CASTS = 4  # reads and writes of each value that goes into a product: for its scale, and by rows and by columns
EXPERT_PRODUCTS = 0.6  # speed of the small products of experts over that of large ones
EXCHANGED = 12  # reads and writes of the values that are sorted by rank before and after an exchange
CONTEXT_WAITS = 2  # time of context-parallel exchanges over that of their bytes: each waits for the slowest rank
LATENCY = 30e-6  # seconds of an exchange of no bytes
UPDATE_HIDES = 0.5  # share of a micro-batch behind which gradients and weights are exchanged


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by cause, on the rank that takes longest."""

    products: float
    attention: float
    elements: float
    """Norms, activations, rotary embedding, residuals: limited by memory bandwidth."""
    exchange: float
    """Between tensor-, context- and expert-parallel ranks, and stages on other machines, while the GPU waits."""
    host: float
    """The GPU waits for the CPU to start its kernels."""
    bubble: float
    """Of the pipeline."""
    update: float
    """AdamW, and gradients and weights whose exchange is not hidden."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def step_time(
    config: TrainConfig, hf: PretrainedConfig, ranks: int, rates: Rates, sample_length: float = 0.0
) -> StepTime:
    """Predict a step of `config` on `ranks` ranks.

    Args:
        sample_length: mean length of the sample that a token is in, so the sum of squared lengths over the sum of
            lengths; 0 for one sample per pack.
    """
    replicas = config.data_parallel(ranks)
    micro_batches = config.global_batch_size // (replicas * config.micro_batch_size)
    tokens = config.seq_length * config.micro_batch_size / config.context_parallel
    products, attention = _products(config, hf, rates), _attention(config, hf, rates, sample_length)
    parts = [tokens * products, tokens * attention, tokens * _elements(config, hf) / rates.copy]
    layers = hf.num_hidden_layers / config.pipeline_parallel
    exchange = layers * _exchange(config, hf, rates, tokens) + _between_stages(config, hf, ranks, rates, tokens)
    micro = sum(parts) + exchange
    waits = max(0.0, layers * rates.host - micro)
    bubble = (config.pipeline_parallel - 1) / config.virtual_pipeline * (micro + waits)
    return StepTime(
        products=micro_batches * parts[0],
        attention=micro_batches * parts[1],
        elements=micro_batches * parts[2],
        exchange=micro_batches * exchange,
        host=micro_batches * waits,
        bubble=bubble,
        update=_update(config, hf, ranks, rates, micro + waits),
    )


def _products(config: TrainConfig, hf: PretrainedConfig, rates: Rates) -> float:
    """Seconds per token of the last pipeline stage, which also has the output layer."""
    shares = recomputed_shares(config, hf)
    dense, experts = (flops * (1 + shares["full"] / 3) for flops in layer_flops(hf))
    if not expert_count(hf):
        # Selective: the first product of the MLP; in FP8 all of it.
        again = 2 * hf.hidden_size * (3 if config.precision == "fp8" else 2) * hf.intermediate_size
        dense += shares["selective"] * again
    layers = hf.num_hidden_layers / config.pipeline_parallel
    head = 6 * hf.hidden_size * hf.vocab_size / config.tensor_parallel
    # With expert parallelism a rank has fewer experts and as many more tokens for each.
    dense_of_rank, of_experts = layers * dense / config.tensor_parallel, layers * experts / config.tensor_parallel
    faster = FP8_PRODUCTS if config.precision == "fp8" else 1.0  # of the layers
    return ((dense_of_rank + of_experts / EXPERT_PRODUCTS) / faster + head) / rates.products


def _attention(config: TrainConfig, hf: PretrainedConfig, rates: Rates, sample_length: float) -> float:
    """Seconds per token."""
    length = sample_length or config.seq_length
    flops = attention_flops(hf, length) / config.pipeline_parallel / config.tensor_parallel
    rate = rates.attention * length / (length + rates.half_length)
    again = 1 + recomputed_shares(config, hf)["full"] / 3
    heads, _ = context_parallel_width(config, hf)
    padded = heads * config.tensor_parallel / (hf.num_attention_heads * head_dim(hf))
    return again * padded * flops / rate


def _elements(config: TrainConfig, hf: PretrainedConfig) -> float:
    """Bytes per token that are read and written besides products and attention, 2 for each value."""
    tensor, experts = config.tensor_parallel, expert_count(hf)
    hidden = hf.hidden_size / (tensor if config.sequence_parallel else 1)
    inner = hf.moe_intermediate_size * hf.num_experts_per_tok if experts else hf.intermediate_size
    # Of the MLP: forward 3, again 3, backward 6 times its inner size. Two norms, two residuals and rotary: 28 hidden.
    layer = 12 * inner / tensor + 28 * hidden
    if experts:  # rows to the experts and back, forward and backward, each gathered, scattered and summed
        layer += 24 * hf.num_experts_per_tok * hidden
    if config.context_parallel > 1:
        heads, groups = context_parallel_width(config, hf)
        layer += EXCHANGED * (heads + groups)
    if config.precision == "fp8":  # inputs of the four products, and gradients of their outputs
        heads, groups = (n * head_dim(hf) / tensor for n in (hf.num_attention_heads, hf.num_key_value_heads))
        layer += FP8_CASTS * (2 * heads + 2 * groups + 4 * hidden + 3 * inner / tensor)
    layer *= 1 + recomputed_shares(config, hf)["full"] / 3
    return 2 * (layer * hf.num_hidden_layers / config.pipeline_parallel + 3 * hf.vocab_size / tensor)


def _exchange(config: TrainConfig, hf: PretrainedConfig, rates: Rates, tokens: float) -> float:
    """Seconds per layer and micro-batch between tensor-, context- and expert-parallel ranks."""
    tensor, context, expert = config.tensor_parallel, config.context_parallel, config.expert_parallel
    shares = recomputed_shares(config, hf)
    again = shares["full"]
    seconds = 0.0
    if tensor > 1:
        # Before and after attention and MLP, forward and backward; two inputs are gathered again for weight gradients.
        times = 10 + 4 * again + shares["selective"] if config.sequence_parallel else 8 + 4 * again
        seconds += times * _ring(2 * tokens * hf.hidden_size, tensor, rates)
    if context > 1:  # queries, keys, values and outputs; then their gradients
        widths = 2 * context_parallel_width(config, hf)
        times = (2 + again) * CONTEXT_WAITS
        seconds += times * sum(_ring(2 * tokens * width, context, rates) for width in widths)
    if expert > 1:
        hidden = hf.hidden_size / (tensor if config.sequence_parallel else 1)
        seconds += (4 + 2 * again) * _ring(2 * tokens * min(hf.num_experts_per_tok, expert) * hidden, expert, rates)
    return seconds


def _between_stages(config: TrainConfig, hf: PretrainedConfig, ranks: int, rates: Rates, tokens: float) -> float:
    """Seconds per micro-batch to send activations and gradients to stages on other machines; within one, nothing."""
    if config.pipeline_parallel == 1 or ranks <= rates.gpus_per_node:
        return 0.0
    hidden = hf.hidden_size / (config.tensor_parallel if config.sequence_parallel else 1)
    return 2 * (LATENCY + 2 * tokens * hidden / rates.network)


def _ring(nbytes: float, size: int, rates: Rates, link: float = 0.0) -> float:
    """Seconds to all-gather or reduce-scatter `nbytes`, the size of the whole, among `size` ranks."""
    return LATENCY + nbytes * (size - 1) / size / (link or rates.link(size)) if size > 1 else 0.0


def _update(config: TrainConfig, hf: PretrainedConfig, ranks: int, rates: Rates, micro: float) -> float:
    held, sharded = held_parameters(config, hf, ranks)
    gradient, moment = (2 if name == "bf16" else 4 for name in (config.gradients, config.moments))
    # Weights and their lower bits, gradients and two moments, read and written; gradients are zeroed and summed before.
    traffic = (sharded * (8 + 2 * gradient + 4 * moment) + held * gradient) / rates.copy
    stage = ranks // config.pipeline_parallel  # consecutive ranks
    replicas = stage // config.tensor_parallel
    exchange = _ring(held * (gradient + 2), replicas, rates, rates.link_across(stage, replicas))
    return traffic + (max(0.0, exchange - UPDATE_HIDES * micro) if config.overlap else exchange)
