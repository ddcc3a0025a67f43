"""The loss head compared with autograd's cross-entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from rsft_lib.model import loss_head
from rsft_lib.model.distributed import ranks
from rsft_lib.model.loss_head import Targets, weighted_loss

T, H = 7, 12


@pytest.fixture(scope="module")
def alone():
    with ranks():
        yield torch.distributed.group.WORLD


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape))


@pytest.fixture(params=[loss_head.CHUNK, 3], ids=["one chunk", "chunks of 3"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(loss_head, "CHUNK", request.param)


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


def test_a_micro_batch_without_trained_tokens_has_zero_gradients(alone):
    hidden, weight = torch.randn(T, H, requires_grad=True), parameter(20, H)
    nothing = Targets(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0))
    loss = weighted_loss(hidden, weight, nothing, alone, 20, watched=(1, 2))
    loss.total.backward()
    assert loss.total == 0 and loss.log_probabilities.shape == (0, 3)
    assert not hidden.grad.any() and not weight.grad.any()
