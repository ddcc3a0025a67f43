"""transformers compared with this kit, on the same packs and GPU; for train_gpu.py."""

import statistics
import time
from pathlib import Path

import torch
from train_gpu import GIB, LENGTH, PEAK, WARMUP, randomize, settings, usual_step
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model.attention import samples_of
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.loss_head import Targets
from rsft_lib.model.weight_map import row_map
from rsft_lib.training.build import build_state
from rsft_lib.training.flops import training_flops

STEPS, SHORT = 3, 8192
_samples: dict = {}  # sample boundaries of the current pack, for `varlen`


def by_hf_name(hf: PretrainedConfig, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors from megatron-core names to Hugging Face names, and regroup their rows."""
    parts = {}
    for ours, origins in row_map(hf).items():
        for rows in origins:
            parts.setdefault(rows.name, []).append(rows.of(named[ours]))
    return {name: torch.cat(rows) for name, rows in parts.items()}


def varlen(module, query, key, value, attention_mask, scaling=None, **_):
    """torch's variable-length FlashAttention with the attention interface of transformers."""
    from torch.nn.attention.varlen import varlen_attn

    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [t, heads, d]
    repeat = rows[0].shape[1] // rows[1].shape[1]
    rows[1:] = [x.repeat_interleave(repeat, dim=1) for x in rows[1:]]
    ends, longest = _samples["ends"], _samples["longest"]
    return varlen_attn(*rows, ends, ends, longest, longest, window_size=(-1, 0)).unsqueeze(0), None


def measure_liger(model: Path, data: Path, checkpointing: bool, micro_batches: int) -> dict:
    """transformers with Liger's kernels, varlen attention and torch's fused AdamW on float32 master weights."""
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2()
    ALL_ATTENTION_FUNCTIONS["varlen"] = varlen
    hf = read_config(model)
    hf._attn_implementation = "varlen"
    torch.set_default_device("cuda")
    network = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16).train()
    torch.set_default_device("cpu")
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    masters = [weight.detach().float() for weight in network.parameters()]
    adam = torch.optim.AdamW(masters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    packs = PackedDataset(TokenStore(data), LENGTH, 0)
    seconds, rates, trained = [], [], []
    torch.cuda.reset_peak_memory_stats()
    chosen = usual_step(packs)
    for _ in range(WARMUP + STEPS):
        torch.cuda.synchronize()
        began, count = time.perf_counter(), 0
        for master in masters:
            master.grad = None
        for pack in chosen:
            batch = packs.batch([pack])
            count += int((batch["loss_mask"] > 0).sum())
            _forward_backward(network, batch)
        for master, weight in zip(masters, network.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        adam.step()
        with torch.no_grad():
            torch._foreach_copy_(list(network.parameters()), masters)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        flops = training_flops(hf, LENGTH * micro_batches, sum(map(packs.cost, chosen)))
        rates.append(flops / seconds[-1])
        trained.append(count / seconds[-1])
    step = statistics.median(seconds[WARMUP:])
    return {
        "ms_per_micro_batch": 1000 * step / micro_batches,
        "tokens_per_second": LENGTH * micro_batches / step,
        "trained_tokens_per_second": statistics.median(trained[WARMUP:]),
        "mfu": statistics.median(rates[WARMUP:]) / PEAK,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def _forward_backward(network, batch: dict) -> torch.Tensor:
    ends = batch["cu_seqlens"]
    _samples.update(ends=ends.cuda(), longest=int(ends.diff().max()))
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    loss = network(
        input_ids=batch["tokens"].cuda(), position_ids=batch["position_ids"].cuda(), use_cache=False,
        labels=labels.cuda(), shift_labels=labels.cuda(),
    ).loss  # fmt: skip
    loss.backward()
    return loss


def agreement(model: Path, data: Path, layers: int = 6) -> dict:
    """Errors of loss and gradients in bf16 against transformers in float32: both of our backends, and transformers.

    The model has the real shape but `layers` layers. The pack is the full one with the cheapest attention, so that
    attention without FlashAttention fits into memory.
    """
    hf = read_config(model)
    hf.num_hidden_layers, hf.layer_types = layers, hf.layer_types[:layers]
    small = Path(model).with_name("small")
    small.mkdir(exist_ok=True)
    hf.save_pretrained(small)
    packs = PackedDataset(TokenStore(data), SHORT, 0)
    full = [i for i, samples in enumerate(packs.packs) if packs.store.lengths[samples].sum() > 0.9 * SHORT]
    batch = packs.batch([min(full, key=packs.cost)])
    errors, reference = {}, None
    for backend in ("te", "torch"):
        losses, gradients, weights = _ours(small, batch, backend, hf)
        if reference is None:
            reference = _theirs(hf, batch, weights, torch.float32)
            errors["transformers"] = _errors(_theirs(hf, batch, weights, torch.bfloat16), reference)
        errors[backend] = _errors((losses, gradients), reference)
    return errors


def _ours(model: Path, batch: dict, backend: str, hf: PretrainedConfig):
    from megatron.core.distributed import finalize_model_grads

    with ranks():
        state = build_state(settings(model.parent, checkpoint=str(model), backend=backend), model)
        randomize(state)
        (chunk,) = state.chunks
        targets = Targets(*(t.cuda() for t in _targets(batch)))
        total, log_probabilities = chunk(
            batch["tokens"].cuda(), batch["position_ids"].cuda(), None, labels=targets,
            samples=samples_of(batch["cu_seqlens"].tolist(), torch.device("cuda")),
        )  # fmt: skip
        total.backward()
        finalize_model_grads(state.chunks, None)
        named = {name.split("module.")[-1]: weight for name, weight in chunk.named_parameters()}
        weights = by_hf_name(hf, {name: weight.detach().float() for name, weight in named.items()})
        gradients = by_hf_name(hf, {name: weight.main_grad for name, weight in named.items()})
        return -log_probabilities[:, 0], gradients, weights


def _theirs(hf: PretrainedConfig, batch: dict, weights: dict, dtype: torch.dtype):
    hf._attn_implementation = "sdpa"
    network = AutoModelForCausalLM.from_config(hf, dtype=dtype).cuda().train()
    network.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    losses, ends = [], batch["cu_seqlens"].tolist()
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        chosen = (batch["loss_mask"][0, begin:end] > 0).nonzero()[:, 0].cuda()
        if not len(chosen):
            continue
        hidden = network.model(batch["tokens"][:, begin:end].cuda(), use_cache=False).last_hidden_state[0, chosen]
        logits = network.lm_head(hidden).float()
        labels = batch["labels"][0, begin:end].cuda()[chosen]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        loss.sum().backward()
        losses.append(loss.detach())
        del logits, hidden, loss
    return torch.cat(losses), {name: weight.grad for name, weight in network.named_parameters()}


def _targets(batch: dict) -> Targets:
    positions = batch["loss_mask"][0].nonzero()[:, 0]
    return Targets(positions, batch["labels"][0, positions], batch["loss_mask"][0, positions])


def _errors(results, reference) -> dict[str, float]:
    (losses, gradients), (expected, wanted) = results, reference
    relative = {
        name: ((gradients[name].float() - grad.float()).norm() / grad.float().norm()).item()
        for name, grad in wanted.items()
    }
    return {
        "mean_loss": abs(losses.mean() - expected.mean()).item() / expected.mean().item(),
        "token_loss": (losses - expected).abs().mean().item(),
        "gradient_median": statistics.median(relative.values()),
        "gradient_worst": max(relative.values()),
    }
