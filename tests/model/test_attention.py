"""Attention over packed samples, on one rank and on several, against attention that is written out."""

import weakref

import attending
import pytest
import torch
from attending import attend

from rsft_lib.model import attention
from rsft_lib.model.attention import TorchAttention, samples_of

ENDS, WIDTH = [0, 3, 19, 20, 48], 8
# Heads and groups divided; a group on several ranks; heads padded; groups that cannot be divided; one head a group.
SHAPES = [(12, 2, 2), (12, 2, 4), (28, 4, 4), (12, 2, 8), (28, 4, 8), (14, 2, 4), (6, 2, 3), (7, 1, 2), (4, 4, 2)]


def written_out(query, key, value, ends: list[int]) -> torch.Tensor:
    sample = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends[1:]), right=True)
    seen = (sample[:, None] == sample) & torch.ones(ends[-1], ends[-1], dtype=torch.bool).tril()
    outputs = []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, group].T / query.shape[2] ** 0.5
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[:, group])
    return torch.stack(outputs, dim=1).flatten(1)


@pytest.mark.parametrize("long", [0, 2**17], ids=["two parts", "at once"])
@pytest.mark.parametrize(("heads", "groups", "ranks"), [*SHAPES, (12, 2, 1)])
def test_output_and_gradients_equal_those_of_attention_that_is_written_out(heads, groups, ranks, long, monkeypatch):
    monkeypatch.setattr(attention, "LONG", long)
    torch.manual_seed(0)
    tensors = [torch.randn(ENDS[-1], n, WIDTH, dtype=torch.float64) for n in (heads, groups, groups)]
    grad, results = torch.randn(ENDS[-1], heads * WIDTH, dtype=torch.float64), []
    for compute in (
        lambda *x: attend(TorchAttention, *x, samples_of(ENDS), ranks=ranks),
        lambda *x: written_out(*x, ENDS),
    ):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = compute(*leaves)
        output.backward(grad)
        results.append([output.detach(), *(x.grad for x in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("long", "exchanges"), [(0, 4), (2**17, 2)])
def test_an_exchange_holds_tensors_only_until_it_is_over(long, exchanges, monkeypatch):
    class Work:
        wait = print

    running, started = weakref.WeakSet(), []

    def send(received, by_rank, **_):
        received.copy_(by_rank)
        started.append(by_rank.shape)
        running.add(work := Work())
        return work

    monkeypatch.setattr(attention, "LONG", long)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", send)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", print)
    tensors = [torch.randn(24, 1, 4, WIDTH, requires_grad=True) for _ in range(3)]
    output = attending.attention(TorchAttention, 4, 4, WIDTH, ranks=2)(*tensors, attention_bias=samples_of([0, 48]))
    assert len(started) == exchanges and not running
    output.sum().backward()
    assert len(started) == 2 * exchanges and not running
