"""The kit's replacements of megatron-core's layers."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP
from support import random_store, settings, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import build_model
from rsft_lib.model.transformer_config import transformer_config
from rsft_lib.training import build
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.loop import update
from rsft_lib.training.state import start

LENGTH = 24


@pytest.fixture
def model(tmp_path):
    tiny_model(tmp_path / "hf")
    hf = read_config(tmp_path / "hf")
    with ranks():
        model = build_model(hf, transformer_config(hf), "torch", LENGTH)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.1)
        yield model


def gradients(model) -> dict[str, torch.Tensor]:
    tokens = torch.arange(LENGTH)[None]
    model.zero_grad()
    model(tokens, tokens).square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_the_activation_of_an_mlp_is_freed_until_the_backward_pass(model, monkeypatch):
    kept = []
    for layer in model.decoder.layers:
        layer.mlp.linear_fc2.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].untyped_storage()))
    tokens = torch.arange(LENGTH)[None]
    output = model(tokens, tokens)
    assert [storage.nbytes() for storage in kept] == [0] * len(model.decoder.layers)
    output.sum().backward()

    lean = gradients(model)
    monkeypatch.setattr(type(model.decoder.layers[0].mlp), "forward", MLP.forward)
    for name, expected in gradients(model).items():
        assert torch.equal(lean[name], expected), name


def test_recomputed_norms_and_mlps_have_the_same_gradients(model, monkeypatch):
    """Emulates `recompute: selective` with Transformer Engine, using local layers."""
    monkeypatch.setattr(CheckpointWithoutOutput.__init__, "__defaults__", (None,))  # which counts as FP8
    expected = gradients(model)
    for layer in model.decoder.layers:  # there, the norm before an MLP is fused into its first linear layer
        layer.recompute_input_layernorm, layer.recompute_pre_mlp_layernorm = True, False
    monkeypatch.setattr(model.config, "recompute_granularity", "selective")
    monkeypatch.setattr(model.config, "recompute_modules", ["layernorm"])
    passes = []
    for layer in model.decoder.layers:
        layer.mlp.linear_fc1.register_forward_pre_hook(lambda *_: passes.append(1))
    for name, found in gradients(model).items():  # the summation order differs
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(passes) == 2 * len(model.decoder.layers)


@pytest.mark.parametrize(("layers", "more"), [(0, 4), (3, 3), (9, 4)])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_may_be_limited_to_some_layers(recompute, layers, more, tmp_path):
    """Passes through attention and MLP: the MLP alone is recomputed where it is selective."""
    tiny_model(tmp_path)
    config = settings(checkpoint="c", data="d", output="o", recompute=recompute, recompute_layers=layers)
    hf, tokens = read_config(tmp_path), torch.arange(LENGTH)[None]
    with ranks():
        model = build_model(hf, build.model_settings(config, hf), "torch", LENGTH)
        found = [{"attention": 0, "mlp": 0} for _ in model.decoder.layers]
        for layer, passes in zip(model.decoder.layers, found, strict=True):
            for part, module in (("attention", layer.self_attention), ("mlp", layer.mlp.linear_fc1)):
                count = lambda *_, passes=passes, part=part: passes.update({part: passes[part] + 1})  # noqa: E731
                module.register_forward_hook(count)
        model(tokens, tokens).sum().backward()
    first, rest = {"selective": ((1, 2), (1, 1)), "full": ((2, 2), (1, 2))}[recompute]
    assert [tuple(passes.values()) for passes in found] == [first] * more + [rest] * (4 - more)


def test_a_second_backward_pass_through_a_graph_works(model):
    tokens = torch.arange(LENGTH)[None]
    total = model(tokens, tokens).square().sum()
    once, twice = (torch.autograd.grad(total, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_starts_from_the_weights_of_the_checkpoint(precision, tmp_path):
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    data = PackedDataset(TokenStore(random_store(tmp_path / "data")), 96, seed=0)
    given = {"checkpoint": str(tmp_path / "megatron"), "data": str(tmp_path / "data"), "output": str(tmp_path / "run")}
    config = settings(**given, precision=precision, lr=1e-2, warmup_fraction=0.0)
    with ranks():
        state = build_state(config, tmp_path / "megatron")
        start(state, tmp_path / "megatron")
        (chunk,) = state.chunks
        before = {name: weight.detach().float().clone() for name, weight in chunk.named_parameters()}
        update(state, Loader(data, config), data.step(0, 4))
        after = {name: weight.detach().float() for name, weight in chunk.named_parameters()}
    for name, weight in before.items():
        assert weight.any(), name
        moved = (after[name] - weight).abs()
        # AdamW's first step is one learning rate; weight decay is a thousandth of it, and bf16 has 8 bits.
        assert 0 < moved.max() < 1.1e-2 + 2**-7 * weight.abs().max(), name


def test_the_weights_are_in_memory_once_when_their_buffer_is_allocated(tmp_path, monkeypatch):
    tiny_model(tmp_path)
    held = []

    def wrap(settings, ddp, model, **rest):
        held.append(sum(weight.untyped_storage().nbytes() for weight in model.parameters()))
        return DistributedDataParallel(settings, ddp, model, **rest)

    monkeypatch.setattr(build, "DistributedDataParallel", wrap)
    with ranks():
        state = build_state(settings(checkpoint=str(tmp_path), data="d", output="o"), tmp_path)
        whole = sum(weight.nbytes for weight in state.chunks[0].parameters())
    assert held[0] < whole / 100


def test_without_gradients_nothing_is_discarded(model):
    kept = []
    model.decoder.layers[0].mlp.linear_fc2.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        model(tokens, tokens)
    assert kept[0].untyped_storage().nbytes() and kept[0].isfinite().all()
