"""Attention over packed samples, on one rank and on several, against attention that is written out."""

from types import SimpleNamespace

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


@pytest.mark.parametrize(("heads", "groups", "ranks"), [*SHAPES, (12, 2, 1)])
def test_output_and_gradients_equal_those_of_attention_that_is_written_out(heads, groups, ranks):
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


class QueryOnly(TorchAttention):
    """Exchanges heads and returns them as they are."""

    def attend(self, query, key, value, samples):
        return query


@pytest.mark.parametrize("heads", [4, 7], ids=["divisible heads", "padded heads"])
@pytest.mark.parametrize(("width", "start"), [(8, 0), (8, 1), (3, 0)], ids=["aligned", "misaligned", "odd width"])
def test_an_exchange_keeps_every_bit_of_bf16_heads_and_gradients(heads, width, start):
    numbers = torch.randint(-(2**15), 2**15, (24, heads, 16), dtype=torch.int16).view(torch.bfloat16)  # also NaN
    query = numbers[..., start : start + width].requires_grad_()  # a part of wider rows, as keys and values are
    key, grad = torch.zeros(24, 1, width, dtype=torch.bfloat16), numbers.flip(0)[..., :width].flatten(1)
    output = attend(QueryOnly, query, key, key, samples_of([0, 24]), ranks=2)
    output.backward(grad)
    for found, expected in ((output, query.flatten(1)), (query.grad.flatten(1), grad)):
        assert torch.equal(found.detach().view(torch.int16), expected.detach().contiguous().view(torch.int16))


def test_an_exchange_accepts_a_gradient_that_is_one_number_for_all():
    query = torch.randn(24, 4, WIDTH, requires_grad=True)
    attend(QueryOnly, query, query[:, :1], query[:, :1], samples_of([0, 24]), ranks=2).sum().backward()
    assert torch.equal(query.grad, torch.ones_like(query))


def saved(compute) -> int:
    """Bytes that autograd saves for the backward pass of `compute()`."""
    storages = {}
    keep = lambda x: storages.setdefault(x.untyped_storage().data_ptr(), x)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        compute()
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def test_an_exchange_saves_nothing_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_to_all_single", lambda received, sent, **_: received.copy_(sent))
    group = SimpleNamespace(size=lambda: 2)
    monkeypatch.setattr(attention.parallel_state, "get_context_parallel_group", lambda: group)
    own, every = (
        [torch.randn(*shape, n, WIDTH, requires_grad=True) for n in heads]
        for shape, heads in (((24, 1), (12, 2, 2)), ((48,), (6, 1, 1)))
    )
    module, samples = attending.attention(TorchAttention, 12, 2, WIDTH, ranks=2), samples_of([0, 48])
    assert saved(lambda: module(*own, attention_bias=samples)) == saved(lambda: module.attend(*every, samples)) > 0
