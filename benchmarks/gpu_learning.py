"""Learning curves of a model with about 100M parameters, with this kit and transformers; for train_gpu.py."""

import json
import math
import time
from pathlib import Path

import torch
from gpu_peers import by_hf_name
from train_gpu import randomize
from transformers import AutoModelForCausalLM, Qwen2Config

from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model.distributed import ranks
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loop import update
from rsft_lib.training.loss_stats import weight_sum

STEPS, LENGTH, PACKS = 300, 8192, 2


def learn(kind: str, folder: Path, output: Path) -> dict:
    """Train for STEPS steps and return the curve, which train_gpu.py writes to OUT/learn-<kind>.json.

    Args:
        kind: 'ours' (bf16), 'fp8-' and a recipe, or 'transformers' (torch's AdamW on float32 weights, bf16 by
            autocast).
    """
    model = folder / "small100m"
    model.mkdir(exist_ok=True)
    hf = Qwen2Config(
        vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, rope_theta=10_000.0, max_position_embeddings=131_072,
    )  # fmt: skip
    hf.save_pretrained(model)
    config = TrainConfig(
        checkpoint=str(model), data=str(folder / "mix"), output=str(folder / "learn"), seq_length=LENGTH,
        global_batch_size=PACKS, train_iters=STEPS, lr=1e-4, min_lr=1e-5, **_precision(kind),
    )  # fmt: skip
    data = PackedDataset(TokenStore(config.data), LENGTH, config.seed)
    began = time.time()
    with ranks():
        state = build_state(config, model)
        randomize(state)
        losses = _theirs(config, state, hf, data) if kind == "transformers" else _ours(config, state, data)
    parameters = sum(weight.numel() for weight in state.chunks[0].parameters())
    return {
        "parameters": parameters,
        "seconds": time.time() - began,
        "first": losses[0],
        "last": losses[-1],
        "curve": losses,
    }


def _precision(kind: str) -> dict[str, str]:
    precision, _, recipe = kind.partition("-")
    return {"precision": "fp8", "fp8_recipe": recipe} if precision == "fp8" else {"precision": "bf16"}


def _ours(config: TrainConfig, state, data: PackedDataset) -> list[float]:
    losses, loader = [], Loader(data, config)
    for number in range(STEPS):
        counts = update(state, loader, data.step(number, PACKS), data.step(number + 1, PACKS)).counts
        state.scheduler.step(increment=1)
        losses.append(counts[0] / weight_sum(counts))
    return losses


def _theirs(config: TrainConfig, state, hf: Qwen2Config, data: PackedDataset) -> list[float]:
    """With transformers' packed attention, which separates samples where position ids restart."""
    named = {name.split("module.")[-1]: weight for name, weight in state.chunks[0].named_parameters()}
    weights = by_hf_name(hf, {name: weight.detach().float() for name, weight in named.items()})
    hf._attn_implementation = "sdpa"
    network = AutoModelForCausalLM.from_config(hf, dtype=torch.float32).cuda().train()
    missing = network.load_state_dict(weights, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"]), missing
    decayed = [weight for weight in network.parameters() if weight.dim() > 1]
    others = [weight for weight in network.parameters() if weight.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=1e-8, fused=True,
    )  # fmt: skip
    losses = []
    for number in range(STEPS):
        packs = data.step(number, PACKS)
        batches = [data.batch([pack]) for pack in packs]
        denominator, total = sum(float(batch["loss_mask"].sum()) for batch in batches), 0.0
        for batch in batches:
            loss = _summed_loss(network, batch)
            (loss / denominator).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad)
        for group in adam.param_groups:
            group["lr"] = _rate(config, number + 1)
        adam.step()
        adam.zero_grad()
        losses.append(total / denominator)
    return losses


def _summed_loss(network, batch: dict) -> torch.Tensor:
    chosen = batch["loss_mask"][0].nonzero()[:, 0].cuda()
    labels = batch["labels"][0].cuda()[chosen]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        tokens, positions = batch["tokens"].cuda(), batch["position_ids"].cuda()
        hidden = network.model(tokens, position_ids=positions, use_cache=False).last_hidden_state[0, chosen]
        logits = network.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _rate(config: TrainConfig, step: int) -> float:
    warm = int(config.warmup_fraction * config.train_iters)
    if step <= warm:
        return config.lr * step / warm
    share = (step - warm) / (config.train_iters - warm)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * share)) / 2


KINDS = ("transformers", "ours", "fp8-tensorwise", "fp8-delayed", "fp8-blockwise")
FP8_STEPS = 200  # first steps, over which FP8 is compared with bf16


def compare(output: Path) -> dict[str, dict[str, float]]:
    """Maximum and mean relative deviation of the curves, and a plot of all in OUT/learning.png.

    Ours is compared with transformers, FP8 with ours.
    """
    import matplotlib.pyplot as plt

    files = {kind: output / f"learn-{kind}.json" for kind in KINDS}
    curves = {kind: json.loads(file.read_text())["curve"] for kind, file in files.items() if file.exists()}
    figure, axes = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    deviations = {}
    for kind, curve in curves.items():
        axes[0].plot(range(1, len(curve) + 1), curve, "-" if kind == "transformers" else "--", label=kind)
        reference = "transformers" if kind == "ours" else "ours"
        if kind == "transformers" or reference not in curves:
            continue
        deviation = [a / b - 1 for a, b in zip(curve, curves[reference], strict=True)]
        axes[1].plot(range(1, len(deviation) + 1), [100 * x for x in deviation], label=f"{kind} - {reference}")
        counted = [abs(x) for x in (deviation if kind == "ours" else deviation[:FP8_STEPS])]
        deviations[kind] = {"worst": max(counted), "mean": sum(counted) / len(counted)}
    axes[0].set(title="100M parameters from random weights", ylabel="loss per trained token")
    axes[1].set(xlabel="step", ylabel="difference, %")
    for axis in axes:
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(output / "learning.png", dpi=120)
    return deviations
