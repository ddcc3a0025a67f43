"""What the kit puts into megatron-core's layers: pytest tests/test_layers.py"""

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from support import tiny_model

from rsft_lib.model.config import read_config, transformer_config
from rsft_lib.model.gpt import build_model
from rsft_lib.ranks import ranks

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


def test_the_activation_of_an_mlp_takes_no_memory_until_its_gradient_is_needed(model, monkeypatch):
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


def test_without_gradients_nothing_is_discarded(model):
    kept = []
    model.decoder.layers[0].mlp.linear_fc2.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        model(tokens, tokens)
    assert kept[0].untyped_storage().nbytes() and kept[0].isfinite().all()
