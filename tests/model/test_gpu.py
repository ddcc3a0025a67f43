"""Results on a GPU compared with those on a CPU, for kernels and whole runs."""

import importlib.util
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attending import attend
from families import tiny_family
from support import TESTS, VOCAB, all_tensors, random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.run_checkpoints import newest
from rsft_lib.common.artifact import write_json
from rsft_lib.evaluation.token_losses import TokenLosses
from rsft_lib.launch import launch, launch_scoring
from rsft_lib.model.attention import TEAttention, TorchAttention, samples_of
from rsft_lib.model.distributed import ranks
from rsft_lib.model.loss_head import Targets, add_product_, cross_entropy_backward_, log_sum_exp, weighted_loss
from rsft_lib.training.adam import MASTER, AdamW
from rsft_lib.training.build import build_state
from rsft_lib.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
HAS_TE = importlib.util.find_spec("transformer_engine") is not None
ROWS, WIDTH = 300, 1536


def random(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.cpu().double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def same(function, *arguments, tolerance: float = 4e-3) -> None:
    """Compare a function of loss_head.py on the GPU with itself on the CPU, in float32 from the same bf16."""
    wide = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]
    there = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
    found, expected = function(*there), function(*wide)
    if function.__name__.endswith("_"):  # it overwrites its first argument
        found, expected = there[0], wide[0]
    assert apart(found, expected) < tolerance, function.__name__


def test_the_loss_head_kernels_match_their_reference():
    logits, labels, weights = 3 * random(64, 151_936), torch.randint(-9000, 160_000, (64,)), torch.rand(64)
    same(log_sum_exp, logits, tolerance=1e-6)
    same(cross_entropy_backward_, logits, log_sum_exp(logits), labels, weights)


def test_the_loss_head_is_cross_entropy_in_float32_over_the_real_vocabulary():
    rows, vocabulary = 9000, 151_936
    with ranks():
        hidden = (random(rows, WIDTH) / 8).cuda().requires_grad_()
        weight = torch.nn.Parameter((random(vocabulary, WIDTH) / 8).cuda())
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        labels, weights = torch.randint(vocabulary, (rows,)).cuda(), torch.rand(rows).cuda()
        targets = Targets(torch.arange(rows).cuda(), labels, weights)
        found = weighted_loss(hidden, weight, targets, torch.distributed.group.WORLD, vocabulary, watched=(7,))
        found.total.backward()
    total, of_weight = 0.0, torch.zeros_like(weight.main_grad)
    for part in torch.arange(rows).cuda().split(1000):
        wide = hidden.detach()[part].float()
        logits = wide @ weight.detach().float().t()
        probabilities = logits.softmax(-1)
        total += (-probabilities.gather(1, labels[part, None])[:, 0].log() * weights[part]).sum().item()
        of_logits = (
            probabilities.scatter_add_(1, labels[part, None], -torch.ones(len(part), 1).cuda()) * weights[part, None]
        )
        assert apart(hidden.grad[part], (of_logits @ weight.detach().float()).cpu()) < 1e-2, part[0]
        of_weight.addmm_(of_logits.t(), wide)
    assert found.total.item() == pytest.approx(total, rel=1e-3)
    assert apart(weight.main_grad, of_weight.cpu()) < 1e-2


def test_a_weight_gradient_is_added_in_float32():
    grad, x, total = random(ROWS, 640), random(ROWS, 256), torch.randn(640, 256)
    expected = total + grad.float().t() @ x.float()
    found = total.cuda()
    add_product_(found, grad.cuda(), x.cuda())
    assert apart(found, expected) < 1e-5


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_makes_the_same_steps(dtype, moments):
    """The weights are a rank's shards of a buffer, which may start at any offset."""
    sizes, whole = (4096, 1, 5001, 0, 902), torch.randn(10_000)
    found = []
    for device in ("cpu", "cuda"):
        weights = list(whole.clone().to(dtype).to(device).split(sizes))
        group = {"params": weights, "lr": 1e-2, "weight_decay": 0.1}
        ours = AdamW([group], (0.9, 0.95), 1e-8, moments)
        ours.scale = 0.5
        torch.manual_seed(0)
        for _ in range(7):
            grads = torch.randn(10_000).to(device).split(sizes)
            for weight, grad in zip(weights, grads, strict=True):
                setattr(weight, "grad" if dtype == torch.float32 else "decoupled_grad", grad)
            ours.step()
        wide = (w if dtype == torch.float32 else ours.get_state(w, MASTER) for w in weights)
        found.append(torch.cat([w.cpu() for w in wide]))
    tolerance = 1e-5 if moments == torch.float32 else 1e-3
    torch.testing.assert_close(found[1], found[0], atol=tolerance, rtol=tolerance)


ENDS = [0, 100, 137, 400, 512]
ONE_SAMPLE = [0, 4096]  # whole chunks of it have a kernel of their own
SAMPLES = pytest.mark.parametrize("ends", [ENDS, ONE_SAMPLE, [0, 3072, 3500, 4096]], ids=["several", "one", "mixed"])
ATTENTIONS = [
    TorchAttention,
    pytest.param(TEAttention, marks=pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")),
]


def heads_and_grad(length: int) -> list[torch.Tensor]:
    """Query, key, value and the gradient of the output."""
    return [random(length, *shape) for shape in ((12, 128), (2, 128), (2, 128), (12 * 128,))]


@SAMPLES
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_attention_and_its_gradients_match_float32_sample_by_sample(kind, ends):
    query, key, value, grad = heads_and_grad(ends[-1])
    results = []
    for one, device in ((TorchAttention, "cpu"), (kind, "cuda")):
        wide = torch.float32 if device == "cpu" else torch.bfloat16
        inputs = [x.to(device, wide).requires_grad_() for x in (query, key, value)]
        output = attend(one, *inputs, samples_of(ends, device))
        output.backward(grad.to(device, wide))
        results.append([output, *(x.grad for x in inputs)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert apart(found.detach(), expected.detach()) < 1e-2


@SAMPLES
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("size", [2, 4, 8])  # heads divided, groups repeated, heads padded
def test_context_parallel_ranks_together_match_one_rank(kind, ends, size):
    tensors, results = [x.cuda() for x in heads_and_grad(ends[-1])], []
    for parallel in (1, size):
        query, key, value = (x.clone().requires_grad_() for x in tensors[:3])
        output = attend(kind, query, key, value, samples_of(ends, "cuda"), ranks=parallel)
        output.backward(tensors[3])
        results.append([output, query.grad, key.grad, value.grad])
    for found, expected in zip(results[1], results[0], strict=True):
        assert apart(found.detach(), expected.detach().cpu()) < 1e-2


@pytest.fixture(autouse=True)
def many_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)


def test_building_needs_no_more_memory_than_what_is_built(tmp_path):
    tiny_model(tmp_path, hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_key_value_heads=2)
    given = settings(checkpoint=str(tmp_path), data="d", output="o", precision="bf16", gradients="bf16")
    with ranks():
        torch.cuda.reset_peak_memory_stats()
        state = build_state(given, tmp_path)
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del state
    assert peak < 1.1 * held


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    shape = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    tiny_model(folder / "hf", **shape)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "train", samples=120)
    return {"checkpoint": str(folder / "megatron"), "data": str(folder / "train")}


def run(inputs: dict, folder: Path, variants: dict[str, dict], nproc: int = 1) -> dict[str, list[dict]]:
    """The metrics of several runs: consecutive in one process, concurrent with several ranks."""
    paths = []
    for name, changes in variants.items():
        given = {"train_iters": 6, "save_interval": 3, "precision": "bf16", "seq_length": 128, **inputs, **changes}
        paths.append(folder / f"{name}.json")
        write_json(paths[-1], settings(output=str(folder / name), **given).to_json())
    if nproc == 1:
        launch("many", [str(path) for path in paths], 1, folder / "many.log")
    else:
        train = lambda path: launch(  # noqa: E731
            "rsft_lib.training.train", ["--config", str(path)], nproc, path.with_suffix("") / "train.log"
        )
        with ThreadPoolExecutor() as threads:
            list(threads.map(train, paths))
    return {name: read_metrics(folder / name) for name in variants}


def test_both_backends_and_fp8_follow_float32(inputs, tmp_path):
    variants = {"fp32": {"precision": "fp32", "backend": "torch"}, "torch": {"backend": "torch"}}
    if HAS_TE:
        variants |= {"te": {"backend": "te"}, "selective": {"recompute": "selective"}, "full": {"recompute": "full"}}
        variants |= {f"{name} in one layer": variants[name] | {"recompute_layers": 1} for name in ("selective", "full")}
        variants |= {f"fp8-{r}": {"precision": "fp8", "fp8_recipe": r} for r in ("delayed", "tensorwise", "blockwise")}
        variants |= {"low": {"moments": "bf16", "gradients": "bf16"}}
    losses = {name: [r["loss"] for r in metrics] for name, metrics in run(inputs, tmp_path, variants).items()}
    for name, found in losses.items():
        assert found == pytest.approx(losses["fp32"], rel=0.03 if name.startswith("fp8") else 0.01), name


@pytest.fixture(scope="module")
def experts(inputs, tmp_path_factory) -> dict[str, str]:
    """The inputs with a model of eight experts per layer."""
    folder = tmp_path_factory.mktemp("experts")
    shape = {"hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64, "vocab_size": VOCAB}
    tiny_family(folder / "hf", "qwen3_moe", **shape)
    convert(folder / "hf", folder / "megatron")
    return inputs | {"checkpoint": str(folder / "megatron")}


def test_grouped_experts_follow_sequential_ones_in_float32(experts, tmp_path):
    variants = {"fp32": {"precision": "fp32", "backend": "torch"}, "torch": {"backend": "torch"}}
    if HAS_TE:
        variants |= {"te": {"backend": "te"}, "selective": {"recompute": "selective"}, "full": {"recompute": "full"}}
        variants |= {"low": {"moments": "bf16", "gradients": "bf16"}, "frozen": {"freeze_router": True}}
        variants |= {"fp8": {"precision": "fp8", "fp8_recipe": "delayed"}}
    metrics = run(experts, tmp_path, variants)
    expected = [r["loss"] for r in metrics["fp32"]]
    for name, records in metrics.items():
        assert [r["loss"] for r in records] == pytest.approx(expected, rel=0.03 if name == "fp8" else 0.01), name
        assert [sum(r["expert_load"]) for r in records] == pytest.approx([8] * len(records), rel=1e-2), name


def test_a_run_resumes_bit_for_bit_with_deterministic_kernels(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    straight = run(inputs, tmp_path, {"straight": {}})["straight"]
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    shutil.rmtree(newest(tmp_path / "again"))
    MetricsWriter(tmp_path / "again", 4)
    again = run(inputs, tmp_path, {"again": {}})["again"]
    assert [r["loss"] for r in again] == [r["loss"] for r in straight]
    assert [r["grad_norm"] for r in again] == [r["grad_norm"] for r in straight]


LAYOUTS = {
    "dp2": {},
    "dp2-plain": {"overlap": False},
    "tp2": {"tensor_parallel": 2},
    "tp2-sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2-vpp2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "cp2": {"context_parallel": 2},
}
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs")


@TWO
def test_two_gpus_match_the_losses_and_weights_of_one_in_every_layout(inputs, tmp_path):
    single = {"precision": "fp32", "backend": "torch"}
    whole = run(inputs, tmp_path, {"one": single})["one"]
    expected = all_tensors(newest(tmp_path / "one"))
    found = run(inputs, tmp_path, {name: single | changes for name, changes in LAYOUTS.items()}, nproc=2)
    for name, metrics in found.items():
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in metrics] == pytest.approx([r[key] for r in whole], rel=1e-4), (name, key)
        tensors = all_tensors(newest(tmp_path / name))
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert apart(tensor, expected[key]) < 1e-4, (name, key)


@TWO
@pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_two_gpus_follow_one_with_transformer_engine(precision, inputs, tmp_path):
    kind = {"precision": precision, "backend": "te"}
    whole = [r["loss"] for r in run(inputs, tmp_path, {"one": kind})["one"]]
    variants = {name: kind | changes for name, changes in LAYOUTS.items()}
    variants["tp2-sp-full"] = variants["tp2-sp"] | {"recompute": "full"}
    variants["pp2-selective"] = variants["pp2"] | {"recompute": "selective"}
    for name, metrics in run(inputs, tmp_path, variants, nproc=2).items():
        assert [r["loss"] for r in metrics] == pytest.approx(whole, rel=2e-3 if precision == "bf16" else 0.02), name


OVERLAPPED = {name: {"recompute": name} for name in ("none", "selective", "full")} | {"fp8": {"precision": "fp8"}}
OVERLAPPED |= {"selective in one layer": {"recompute": "selective", "recompute_layers": 1}}


@TWO
@pytest.mark.skipif(not HAS_TE, reason="Transformer Engine is not installed")
@pytest.mark.parametrize("changes", OVERLAPPED.values(), ids=OVERLAPPED)
def test_tensor_overlap_has_the_same_losses_and_gradients(changes, inputs, tmp_path):
    kind = {"backend": "te", "save_interval": 1, "split": "8,2,0", **LAYOUTS["tp2-sp"], **changes}
    plain, overlapping = run(inputs, tmp_path, {"plain": kind, "overlap": kind | {"tensor_overlap": True}}, 2).values()
    noise = 10 if changes.get("precision") == "fp8" else 1
    for key, tolerance in (("loss", 2e-3), ("eval_loss", 2e-3), ("grad_norm", 2e-2)):
        found, expected = ([r[key] for r in records if key in r] for records in (overlapping, plain))
        assert found == pytest.approx(expected, rel=noise * tolerance), key
    found, expected = (all_tensors(tmp_path / name / "iter_0000001") for name in ("overlap", "plain"))
    gradients = [key for key in expected if ".exp_avg." in key]  # the first moment is a tenth of the gradient
    assert gradients
    for key in gradients:
        assert apart(found[key], expected[key]) < noise * 2e-2, key


EXPERT_LAYOUTS = {
    "ep2": {"expert_parallel": 2},
    "tp2-sp": LAYOUTS["tp2-sp"],
    "tp2-sp-ep2": LAYOUTS["tp2-sp"] | {"expert_parallel": 2},
    "tp2-sp-etp2": LAYOUTS["tp2-sp"] | {"expert_tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "cp2-ep2": {"context_parallel": 2, "expert_parallel": 2},
}


@TWO
@pytest.mark.parametrize("kind", [{"precision": "fp32", "backend": "torch"}, {"backend": "te"}], ids=["fp32", "te"])
def test_two_gpus_match_one_with_experts_in_every_layout(kind, experts, tmp_path):
    if kind["backend"] == "te" and not HAS_TE:
        pytest.skip("Transformer Engine is not installed")
    whole = [r["loss"] for r in run(experts, tmp_path, {"one": kind})["one"]]
    found = run(experts, tmp_path, {name: kind | changes for name, changes in EXPERT_LAYOUTS.items()}, nproc=2)
    for name, metrics in found.items():
        tolerance = 1e-4 if kind["backend"] == "torch" else 5e-3
        assert [r["loss"] for r in metrics] == pytest.approx(whole, rel=tolerance), name


@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="torch finds fewer than four GPUs")
def test_experts_may_be_partitioned_and_distributed_at_once(experts, tmp_path):
    kind = {"precision": "fp32", "backend": "torch"}
    whole = [r["loss"] for r in run(experts, tmp_path, {"one": kind})["one"]]
    four = kind | LAYOUTS["tp2-sp"] | {"expert_parallel": 2, "expert_tensor_parallel": 2}
    assert [r["loss"] for r in run(experts, tmp_path, {"four": four}, nproc=4)["four"]] == pytest.approx(
        whole, rel=1e-4
    )


@TWO
def test_two_gpus_resume_in_another_layout_with_async_saves(inputs, tmp_path):
    kind = {"precision": "fp32", "backend": "torch", "async_save": True}
    whole = run(inputs, tmp_path, {"whole": kind | LAYOUTS["tp2-sp"]}, nproc=2)["whole"]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(newest(tmp_path / "again"))
    again = run(inputs, tmp_path, {"again": kind | LAYOUTS["pp2-vpp2"]}, nproc=2)["again"]
    assert [r["iteration"] for r in again] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in whole], rel=1e-4)


@TWO
def test_two_gpus_score_the_same_losses_as_one(inputs, tmp_path):
    for nproc in (1, 2):
        launch_scoring(inputs["checkpoint"], inputs["data"], tmp_path / f"by{nproc}", nproc)
    one, two = (torch.from_numpy(TokenLosses(tmp_path / f"by{nproc}").values.copy()) for nproc in (1, 2))
    torch.testing.assert_close(one, two, equal_nan=True)
