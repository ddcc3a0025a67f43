"""Lower bound of a micro-batch's time on this GPU, and cost of several loss heads; for train_gpu.py."""

import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from train_gpu import GIB, LENGTH, MICRO_BATCHES, usual_step

from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model.attention import TEAttention, samples_of
from rsft_lib.model.config import head_dim, read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.loss_head import Targets, add_product_, weighted_loss
from rsft_lib.model.transformer_config import transformer_config
from rsft_lib.training.flops import parameters


def milliseconds(function, repeats: int = 20, warmup: int = 5) -> float:
    """Median GPU time of a call, in milliseconds."""
    for _ in range(warmup):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        function()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def floor(model: Path, data: Path) -> dict:
    """Time of the cuBLAS products, attention, and 1/MICRO_BATCHES of AdamW's memory traffic, measured on this GPU."""
    hf = read_config(model)
    products = {name: _product(*shape) for name, shape in _shapes(hf).items()}
    layers = hf.num_hidden_layers
    gemms = sum(sum(times.values()) * (1 if name == "head" else layers) for name, times in products.items())
    attention = layers * _attention(hf, data)
    bandwidth = _bandwidth()
    # Bytes per parameter: bf16 weight + 16 bits and two moments, each read and written; one gradient read.
    adam = parameters(hf) * 28 / bandwidth * 1000
    return {
        "gemms_ms": gemms, "attention_ms": attention, "adam_ms": adam, "bandwidth_tb": bandwidth / 1e12,
        "total_ms": gemms + attention + adam / MICRO_BATCHES, "products": products, "wgrad_ms": _weight_gradients(hf),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def _shapes(hf) -> dict[str, tuple[int, int]]:
    width = head_dim(hf)
    queries, keys = hf.num_attention_heads * width, hf.num_key_value_heads * width
    return {
        "qkv": (hf.hidden_size, queries + 2 * keys), "proj": (queries, hf.hidden_size),
        "fc1": (hf.hidden_size, 2 * hf.intermediate_size), "fc2": (hf.intermediate_size, hf.hidden_size),
        "head": (hf.hidden_size, hf.vocab_size),
    }  # fmt: skip


def _product(in_size: int, out_size: int) -> dict[str, float]:
    x, weight, grad = random(LENGTH, in_size), random(out_size, in_size), random(LENGTH, out_size)
    return {
        "forward": milliseconds(lambda: x @ weight.t()),
        "of_input": milliseconds(lambda: grad @ weight),
        "of_weight": milliseconds(lambda: grad.t() @ x),
    }


def _weight_gradients(hf) -> dict[str, dict[str, float]]:
    """Accumulation of weight gradients in float32, by PyTorch and by Transformer Engine, in milliseconds."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    times = {}
    for name, (in_size, out_size) in _shapes(hf).items():
        rows = 4096 if name == "head" else LENGTH
        x, grad = random(rows, in_size), random(rows, out_size)
        total = torch.zeros(out_size, in_size, device="cuda")
        by_te = lambda x=x, grad=grad, total=total: general_gemm(  # noqa: E731
            x, grad, out_dtype=torch.float32, layout="NT", grad=True, accumulate=True, out=total
        )
        times[name] = {
            "torch": milliseconds(lambda x=x, grad=grad, total=total: add_product_(total, grad, x)),
            "te": milliseconds(by_te),
        }
    return times


def _attention(hf, data: Path, alone: bool = True) -> float:
    """Milliseconds of one layer's attention, forward and backward, averaged over the packs of a step.

    Args:
        alone: whether there are no process groups yet.
    """
    with ranks() if alone else nullcontext():
        inner = TEAttention(transformer_config(hf), 1, None, "self").cuda()
        packs = PackedDataset(TokenStore(data), LENGTH, 0)
        width, heads, groups = head_dim(hf), hf.num_attention_heads, hf.num_key_value_heads
        times = []
        for pack in usual_step(packs):
            samples = samples_of(packs.batch([pack])["cu_seqlens"].tolist(), torch.device("cuda"))
            query, key, value = (random(LENGTH, 1, n, width).requires_grad_() for n in (heads, groups, groups))
            grad = random(LENGTH, 1, heads * width)

            def both(query=query, key=key, value=value, samples=samples, grad=grad):
                inner(query, key, value, attention_bias=samples).backward(grad)

            times.append(milliseconds(both, repeats=10, warmup=3))
    return statistics.fmean(times)


def _bandwidth() -> float:
    """Memory bandwidth: bytes read and written per second by a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1000


def loss_heads(model: Path) -> dict:
    """Forward and backward of output layer and loss with all positions trained: ours, plain PyTorch, and Liger."""
    hf = read_config(model)
    hidden = (random(LENGTH, hf.hidden_size) / 8).requires_grad_()
    weight = torch.nn.Parameter(random(hf.vocab_size, hf.hidden_size) / 50)
    labels = torch.randint(hf.vocab_size, (LENGTH,), device="cuda")
    targets = Targets(torch.arange(LENGTH, device="cuda"), labels, torch.ones(LENGTH, device="cuda"))
    with ranks():
        group = torch.distributed.group.WORLD
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        times = {
            "ours": _timed(lambda: weighted_loss(hidden, weight, targets, group, hf.vocab_size, ()).total, [hidden])
        }
        del weight.main_grad
    plain = lambda: torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")  # noqa: E731
    times["plain"] = _timed(plain, [hidden, weight])
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        times["liger"] = _timed(lambda: loss(weight, hidden, labels), [hidden, weight])
    except ImportError:
        pass
    return times


def _timed(forward, leaves: list) -> dict[str, float]:
    def both():
        for leaf in leaves:
            leaf.grad = None
        forward().backward()

    both()
    torch.cuda.synchronize()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    return {"ms": milliseconds(both, repeats=10, warmup=2), "gib": peak}
