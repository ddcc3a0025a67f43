"""Our AdamW compared with torch's, and the split of float32 weights."""

import pytest
import torch

from rsft_lib.training import adam as adam_module
from rsft_lib.training.adam import MASTER, AdamW, adamw_, join, split_


def group(*weights: torch.Tensor, decay: float = 0.1) -> dict:
    return {"params": list(weights), "lr": 1e-2, "weight_decay": decay}


def test_every_bit_pattern_of_a_float32_survives_the_split():
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.randint(0, 2**16, upper.shape, dtype=torch.int32)
    whole = (upper + lower).view(torch.float32)
    whole = whole[whole.abs() < 3.38e38]  # the largest would round to infinity
    weight, rest = torch.empty_like(whole, dtype=torch.bfloat16), torch.empty_like(whole, dtype=torch.int16)
    split_(whole, weight, rest)
    assert torch.equal(join(weight, rest).view(torch.int32), whole.view(torch.int32))
    assert ((weight.float() - whole).abs() <= (whole.bfloat16().float() - whole).abs()).all()  # the nearest one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_match_torch_in_float32(dtype):
    start = [torch.randn(40).to(dtype).float(), torch.randn(8).to(dtype).float()]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in start]
    reference = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    ours = [weight.to(dtype) for weight in start]
    adam = AdamW([group(ours[0]), group(ours[1], decay=0.0)], (0.9, 0.95), 1e-8, torch.float32)
    adam.scale = 0.5
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            grad = torch.randn_like(other)
            other.grad = grad * 0.5
            setattr(mine, "grad" if dtype == torch.float32 else "decoupled_grad", grad)
        reference.step()
        adam.step()
    for mine, other in zip(ours, theirs, strict=True):
        whole = mine if dtype == torch.float32 else adam.get_state(mine, MASTER)
        torch.testing.assert_close(whole, other.detach(), atol=1e-6, rtol=1e-6)
        assert torch.equal(mine, whole.to(dtype)) or (mine.float() - whole).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_without_a_shard_of_some_or_all_weights_takes_its_step(dtype):
    nothing = torch.empty(0, dtype=dtype)
    nothing.grad = nothing.decoupled_grad = torch.empty(0, dtype=dtype)
    for groups in ([group()], [group(nothing), group()]):
        adam = AdamW(groups, (0.9, 0.95), 1e-8, torch.float32)
        adam.step()
        assert adam.steps == 1


def test_a_change_too_small_for_bf16_is_not_lost():
    weight = torch.ones(1, dtype=torch.bfloat16)
    adam = AdamW([group(weight, decay=0.0)], (0.9, 0.95), 1e-8, torch.float32)
    adam.param_groups[0]["lr"] = 1e-4  # bf16 has no number between 1 and 0.996
    weight.decoupled_grad = torch.ones(1)
    for _ in range(50):
        adam.step()
    assert adam.get_state(weight, MASTER).item() == pytest.approx(1 - 50e-4, rel=1e-5)


def test_states_survive_saving_and_loading():
    weight = torch.randn(30).bfloat16()
    adam = AdamW([group(weight)], (0.9, 0.95), 1e-8, torch.bfloat16)
    weight.decoupled_grad = torch.randn(30)
    adam.step()
    saved = {name: adam.get_state(weight, name) for name in adam.state[weight]}
    other = torch.zeros(30, dtype=torch.bfloat16)
    again = AdamW([group(other)], (0.9, 0.95), 1e-8, torch.bfloat16)
    again.load_state_dict(adam.state_dict())
    for name, value in saved.items():
        again.set_state(other, name, value)
    assert again.steps == 1 and torch.equal(other, weight)
    assert all(torch.equal(again.state[other][name], value) for name, value in adam.state[weight].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_side_by_side_in_memory_are_updated_as_if_alone(dtype, monkeypatch):
    """Two runs of weights with a gap between them; the gradients of the last one lie elsewhere."""
    sizes, name = (6, 4, 2, 8, 5), "grad" if dtype == torch.float32 else "decoupled_grad"
    memory, gradients = torch.randn(40).to(dtype), torch.randn(40)
    kept = (0, 1, 3, 4)
    weights = [memory.split([*sizes, 15])[i] for i in kept]
    alone = [weight.clone() for weight in weights]
    grads = [gradients.split([*sizes, 15])[i] for i in kept[:-1]] + [torch.randn(5)]
    updates = []
    monkeypatch.setattr(adam_module, "adamw_", lambda *given: (updates.append(given[0].numel()), adamw_(*given)))
    for together in (weights, alone):
        for weight, grad in zip(together, grads, strict=True):
            setattr(weight, name, grad if together is weights else grad.clone())
        adam = AdamW([group(*together)], (0.9, 0.95), 1e-8, torch.float32)
        adam.step()
        adam.step()
        assert updates == ([10, 8, 5] if together is weights else [6, 4, 8, 5]) * 2
        updates.clear()
    assert all(map(torch.equal, weights, alone))
