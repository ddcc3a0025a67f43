"""Hand-written gradients against those of autograd: pytest tests/test_functions.py"""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, silu
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from rsft_lib import HAS_GPU
from rsft_lib.model import elementwise, head
from rsft_lib.model.functions import Embedding, Linear, Mlp, Norm, NormLinear, Rotate, TensorParallel
from rsft_lib.model.head import Targets, weighted_loss
from rsft_lib.ranks import ranks

T, H, F = 7, 12, 10


@pytest.fixture(scope="module")
def alone():
    with ranks():
        yield TensorParallel(torch.distributed.group.WORLD, sequence=False)


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


def both(ours, theirs, inputs: list[torch.Tensor], in_main_grad: bool) -> None:
    """Compare outputs and the gradients of all inputs; those of parameters are looked for where DDP keeps them."""
    gradients = []
    for function in (theirs, ours):
        taken = [x.detach().clone().requires_grad_() for x in inputs]
        if function is ours and in_main_grad:
            for x, original in zip(taken, inputs, strict=True):
                if isinstance(original, torch.nn.Parameter):
                    x.main_grad = torch.ones_like(x)  # what an earlier micro-batch left
        outputs = function(*taken)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        gradients.append([x.main_grad - 1 if hasattr(x, "main_grad") else x.grad for x in taken] + list(outputs))
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("in_main_grad", [False, True])
def test_the_embedding_adds_up_what_a_word_gets_at_all_its_places(alone, in_main_grad):
    tokens = torch.tensor([3, 0, 3, 3, 5, 0, 1])
    both(
        lambda w: Embedding.apply(tokens, w, 0, alone), lambda w: embedding(tokens, w), [parameter(6, H)], in_main_grad
    )


@pytest.mark.parametrize("in_main_grad", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_and_product(alone, in_main_grad, recompute, bias):
    def plain(x, norm, weight, *bias):
        return linear(rms_norm(x, (H,), norm, 1e-6), weight, *bias), x.clone()

    def ours(x, norm, weight, *bias):
        return NormLinear.apply(x, norm, weight, *(bias or [None]), 1e-6, alone, recompute)

    inputs = [torch.randn(T, H), parameter(H), parameter(F, H)] + [parameter(F)] * bias
    both(ours, plain, inputs, in_main_grad)


@pytest.mark.parametrize("in_main_grad", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_mlp_with_its_residual(alone, in_main_grad, recompute):
    def plain(x, norm, first, second):
        gate, up = linear(rms_norm(x, (H,), norm, 1e-6), first).chunk(2, dim=-1)
        return x + linear(silu(gate) * up, second)

    def ours(x, norm, first, second):
        return Mlp.apply(x, norm, first, second, 1e-6, alone, recompute)

    both(ours, plain, [torch.randn(T, H), parameter(H), parameter(2 * F, H), parameter(H, F)], in_main_grad)


def test_product_and_norm_by_themselves(alone):
    both(lambda x, w: Linear.apply(x, w, alone), linear, [torch.randn(T, H), parameter(F, H)], in_main_grad=True)
    plain = lambda x, w: rms_norm(x, (H,), w, 1e-6)  # noqa: E731
    both(lambda x, w: Norm.apply(x, w, 1e-6), plain, [torch.randn(T, H), parameter(H)], in_main_grad=True)


def test_rotation_is_that_of_transformers_head_by_head():
    groups, shared, width = 2, 3, 8
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 5])
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
    rotary = torch.stack([angles.cos(), angles.sin()])

    def plain(qkv):
        query, key, value = qkv.split([shared, 1, 1], dim=2)
        turn = torch.cat([angles, angles], dim=-1)[None]
        query, key = (x.flatten(1, 2).transpose(0, 1)[None] for x in (query, key))
        query, key = apply_rotary_pos_emb(query, key, turn.cos(), turn.sin())
        return query[0].transpose(0, 1), key[0].transpose(0, 1), value.squeeze(2).clone()

    both(lambda qkv: Rotate.apply(qkv, rotary, groups), plain, [torch.randn(T, groups, shared + 2, width)], False)


@pytest.fixture(params=[head.CHUNK, 3], ids=["one chunk", "chunks of 3"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", request.param)


@pytest.mark.parametrize("in_main_grad", [False, True])
def test_the_loss_head_is_weighted_cross_entropy_at_the_targets(alone, chunk, in_main_grad):
    words, padding = 20, 4
    positions, weights = torch.tensor([0, 2, 3, 4, 6]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.25])
    targets = Targets(positions, torch.tensor([3, 0, 19, 7, 3]), weights)
    hidden, weight = torch.randn(T, H, requires_grad=True), parameter(words + padding, H)
    logits = linear(hidden[positions], weight)[:, :words]
    expected = (cross_entropy(logits, targets.labels, reduction="none") * weights).sum()
    expected.backward()
    wanted = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    if in_main_grad:
        weight.main_grad = torch.zeros_like(weight)

    found = weighted_loss(hidden, weight, targets, alone, words, watched=(5, 11))
    found.total.backward()
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, wanted[0])
    torch.testing.assert_close(weight.main_grad if in_main_grad else weight.grad, wanted[1])
    log_probabilities = logits.log_softmax(-1)
    columns = torch.stack([targets.labels, torch.full((5,), 5), torch.full((5,), 11)], dim=1)
    torch.testing.assert_close(found.log_probabilities, log_probabilities.gather(1, columns))


def test_evaluation_leaves_the_gradient_buffer_alone(alone):
    hidden, weight = torch.randn(T, H), parameter(20, H)
    weight.main_grad = torch.zeros_like(weight)
    targets = Targets(torch.tensor([1]), torch.tensor([2]), torch.ones(1))
    with torch.no_grad():
        weighted_loss(hidden, weight, targets, alone, 20, watched=())
    assert not weight.main_grad.any()


def test_a_micro_batch_that_trains_nothing_has_a_gradient_of_zero(alone):
    hidden, weight = torch.randn(T, H, requires_grad=True), parameter(20, H)
    nothing = Targets(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss = weighted_loss(hidden, weight, nothing, alone, 20, watched=(1, 2))
    loss.total.backward()
    assert loss.total == 0 and loss.log_probabilities.shape == (0, 3)
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_bf16_gradient_is_that_of_float32_rounded_once():
    grad, x = torch.randn(T, F).bfloat16(), torch.randn(T, 2 * F).bfloat16()
    found, output = elementwise.swiglu_backward_(grad.clone(), x.clone())
    wide = x.float().requires_grad_()
    elementwise.swiglu(wide).backward(grad.float())
    gate, up = wide.chunk(2, dim=-1)
    expected = torch.autograd.grad((silu(gate) * up), wide, grad.float())[0]
    assert torch.equal(found, expected.bfloat16()) or torch.allclose(found.float(), expected, rtol=2**-8)
    assert torch.equal(output, elementwise.swiglu(x))


@pytest.mark.skipif(HAS_GPU, reason="with a GPU megatron-core compiles")
def test_without_a_gpu_a_rank_starts_without_torchs_compiler():
    code = (
        "import sys, torch, rsft_lib.training.train\n"
        "torch.optim.AdamW([torch.zeros(1, requires_grad=True)])\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "every rank takes a second longer to start"
