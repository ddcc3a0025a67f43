"""What a micro-batch costs at least on this GPU, and what the loss head costs in several ways; for train_gpu.py."""

import statistics
from pathlib import Path

import torch
from train_gpu import GIB, LENGTH, MICRO_BATCHES, usual_step

from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model import elementwise
from rsft_lib.model.attention import TEAttention, packed
from rsft_lib.model.config import head_dim, read_config, transformer_config
from rsft_lib.model.functions import TensorParallel, add_product_
from rsft_lib.model.gpt import te_attention
from rsft_lib.model.head import Targets, weighted_loss
from rsft_lib.ranks import ranks
from rsft_lib.training import adam
from rsft_lib.training.flops import parameters


def milliseconds(function, repeats: int = 20, warm: int = 5) -> float:
    """Median time of a call on the GPU."""
    for _ in range(warm):
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
    """cuBLAS products, attention, and an eighth of what AdamW reads and writes, at this GPU's own rates.

    Attention as this kit asks cuDNN for it, and as Transformer Engine does.
    """
    hf = read_config(model)
    products = {name: _product(*shape) for name, shape in _shapes(hf).items()}
    layers = hf.num_hidden_layers
    gemms = sum(sum(times.values()) * (1 if name == "head" else layers) for name, times in products.items())
    by_te, attention = (layers * _attention(hf, data, kind) for kind in (TEAttention, te_attention()))
    bandwidth = _bandwidth()
    adam = parameters(hf) * 28 / bandwidth * 1000  # bf16 + 16 bits, two moments, each read and written; one gradient
    return {
        "gemms_ms": gemms, "attention_ms": attention, "te_attention_ms": by_te, "adam_ms": adam,
        "bandwidth_tb": bandwidth / 1e12, "total_ms": gemms + attention + adam / MICRO_BATCHES,
        "te_total_ms": gemms + by_te + adam / MICRO_BATCHES, "products": products, "wgrad_ms": _weight_gradients(hf),
        "elementwise": _elementwise(hf), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
    }  # fmt: skip


def _shapes(hf) -> dict[str, tuple[int, int]]:
    width = head_dim(hf)
    queries, keys = hf.num_attention_heads * width, hf.num_key_value_heads * width
    return {
        "qkv": (hf.hidden_size, queries + 2 * keys), "proj": (queries, hf.hidden_size),
        "fc1": (hf.hidden_size, 2 * hf.intermediate_size), "fc2": (hf.intermediate_size, hf.hidden_size),
        "head": (hf.hidden_size, hf.vocab_size),
    }  # fmt: skip


def _product(inside: int, outside: int) -> dict[str, float]:
    x, weight, grad = random(LENGTH, inside), random(outside, inside), random(LENGTH, outside)
    return {
        "forward": milliseconds(lambda: x @ weight.t()),
        "of_input": milliseconds(lambda: grad @ weight),
        "of_weight": milliseconds(lambda: grad.t() @ x),
    }


def _weight_gradients(hf) -> dict[str, dict[str, float]]:
    """Adding a weight gradient to float32: by PyTorch and by Transformer Engine."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    found = {}
    for name, (inside, outside) in _shapes(hf).items():
        rows = 4096 if name == "head" else LENGTH
        x, grad = random(rows, inside), random(rows, outside)
        total = torch.zeros(outside, inside, device="cuda")
        by_te = lambda x=x, grad=grad, total=total: general_gemm(  # noqa: E731
            x, grad, out_dtype=torch.float32, layout="NT", grad=True, accumulate=True, out=total
        )
        found[name] = {
            "torch": milliseconds(lambda x=x, grad=grad, total=total: add_product_(total, grad, x)),
            "te": milliseconds(by_te),
        }
    return found


def _attention(hf, data: Path, kind: type) -> float:
    """Milliseconds of one layer's attention, forward and backward, mean over the packs of a step."""
    with ranks():
        inner = kind(transformer_config(hf), 1, None, "self").cuda()
        packs = PackedDataset(TokenStore(data), LENGTH, 0)
        width, heads, groups = head_dim(hf), hf.num_attention_heads, hf.num_key_value_heads
        times = []
        for pack in usual_step(packs):
            samples = packed(packs.batch([pack])["cu_seqlens"].tolist(), torch.device("cuda"))
            query, key, value = (random(LENGTH, n, width).requires_grad_() for n in (heads, groups, groups))
            grad = random(LENGTH, heads * width)

            def both(query=query, key=key, value=value, samples=samples, grad=grad):
                inner(query, key, value, samples).backward(grad)

            times.append(milliseconds(both, repeats=10, warm=3))
    return statistics.fmean(times)


def _elementwise(hf) -> dict[str, dict[str, float]]:
    """Each kernel between the products: milliseconds, and terabytes a second of what it must read and write."""
    hidden, inner, width = hf.hidden_size, hf.intermediate_size, head_dim(hf)
    groups, heads = hf.num_key_value_heads, hf.num_attention_heads
    x, grad, residual, weight = *(random(LENGTH, hidden) for _ in range(3)), random(hidden)
    y, rstd = elementwise.rms_norm(x, weight, 1e-6)
    wide, narrow = random(LENGTH, 2 * inner), random(LENGTH, inner)
    mixed, rotary = random(LENGTH, groups, heads // groups + 2, width), torch.rand(2, LENGTH, width // 2, device="cuda")
    parts = elementwise.rotate(mixed, rotary, groups)
    logits = random(4096, hf.vocab_size)
    sums, labels, weights = (
        elementwise.log_sum_exp(logits),
        torch.zeros(4096, dtype=torch.int64, device="cuda"),
        rstd[:4096],
    )
    size = 2**28
    state = [torch.zeros(size, dtype=t, device="cuda") for t in (torch.bfloat16, torch.int16, *[torch.float32] * 3)]
    update = adam.Update(1e-5, 0.1, 0.9, 0.95, 1e-8, 1, 1.0)
    calls = {
        "rms_norm": (lambda: elementwise.rms_norm(x, weight, 1e-6), 2 * x.nbytes),
        "scale_rows": (lambda: elementwise.scale_rows(x, rstd, weight), 2 * x.nbytes),
        "rms_norm_backward": (lambda: elementwise.rms_norm_backward(grad, x, rstd, weight, residual), 4 * x.nbytes),
        "swiglu": (lambda: elementwise.swiglu(wide), wide.nbytes + narrow.nbytes),
        "swiglu_backward": (lambda: elementwise.swiglu_backward_(narrow, wide), 2 * wide.nbytes + 2 * narrow.nbytes),
        "rotate": (lambda: elementwise.rotate(mixed, rotary, groups), 2 * mixed.nbytes + rotary.nbytes),
        "rotate_backward": (lambda: elementwise.rotate_backward(*parts, rotary), 2 * mixed.nbytes + rotary.nbytes),
        "add": (lambda: x + grad, 3 * x.nbytes),
        "column_sums": (lambda: elementwise.column_sums(mixed.view(LENGTH, -1)), mixed.nbytes),
        "log_sum_exp": (lambda: elementwise.log_sum_exp(logits), logits.nbytes),
        "cross_entropy_backward": (
            lambda: elementwise.cross_entropy_backward_(logits, sums, labels, weights), 2 * logits.nbytes,
        ),
        "adamw": (lambda: adam.adamw_(state[0], state[1], state[2], state[3], state[4], update), 28 * size),
    }  # fmt: skip
    times = {name: (milliseconds(call), size) for name, (call, size) in calls.items()}
    return {name: {"ms": ms, "tb_per_s": size / ms / 1e9} for name, (ms, size) in times.items()}


def _bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1000


def loss_heads(model: Path) -> dict:
    """Forward and backward of output layer and loss, all positions trained: ours, plain, and Liger's."""
    hf = read_config(model)
    hidden = (random(LENGTH, hf.hidden_size) / 8).requires_grad_()
    weight = torch.nn.Parameter(random(hf.vocab_size, hf.hidden_size) / 50)
    labels = torch.randint(hf.vocab_size, (LENGTH,), device="cuda")
    targets = Targets(torch.arange(LENGTH, device="cuda"), labels, torch.ones(LENGTH, device="cuda"))
    with ranks():
        parallel = TensorParallel(torch.distributed.group.WORLD, sequence=False)
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        found = {
            "ours": _timed(lambda: weighted_loss(hidden, weight, targets, parallel, hf.vocab_size, ()).total, [hidden])
        }
        del weight.main_grad
    plain = lambda: torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels, reduction="sum")  # noqa: E731
    found["plain"] = _timed(plain, [hidden, weight])
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["liger"] = _timed(lambda: loss(weight, hidden, labels), [hidden, weight])
    except ImportError:
        pass
    return found


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
    return {"ms": milliseconds(both, repeats=10, warm=2), "gib": peak}
