"""megatron-core against transformers, tensor by tensor: pytest tests/test_parity.py"""

import pytest
import torch
from support import VOCAB, random_store, settings, tiny_model
from torch.nn.functional import cross_entropy

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.sharded import load_weights, sharded_weights
from rsft_lib.checkpoint.verify import differing_tensors, logit_difference
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.model.config import read_config
from rsft_lib.model.weights import to_hf
from rsft_lib.ranks import ranks
from rsft_lib.training.loop import build_state, run_batch
from rsft_lib.training.loss import forward_step


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path_factory):
    """(folder, the Hugging Face model, the converted checkpoint, a store of samples)"""
    folder = tmp_path_factory.mktemp("parity")
    hf = tiny_model(folder / "hf", tie_word_embeddings=request.param)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "store", samples=30)
    return folder, hf, TokenStore(folder / "store")


def loaded_state(folder, **changes):
    config = settings(
        checkpoint=str(folder / "megatron"), data=str(folder / "store"), output=str(folder / "run"), **changes
    )
    state = build_state(config, folder / "megatron")
    load_weights(state.model.module, folder / "megatron")
    return config, state


def test_a_converted_checkpoint_gives_every_tensor_back_and_the_logits_of_transformers(models):
    folder, _, _ = models
    assert differing_tensors(folder / "hf", folder / "megatron") == []
    assert logit_difference(folder / "hf", folder / "megatron") < 1e-4


def test_packed_loss_and_every_gradient_are_those_of_transformers_sample_by_sample(models):
    folder, hf, store = models
    hf.zero_grad()
    total, count = torch.zeros(()), 0
    for tokens, mask in (store[i] for i in range(len(store))):
        ids = torch.from_numpy(tokens).long()
        labels = torch.where(torch.from_numpy(mask).bool(), ids, -100)
        logits = hf(ids[None]).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int(mask[1:].sum())
    (total / count).backward()

    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        assert len(data) < len(store) / 2  # several samples to a pack
        state.model.zero_grad_buffer()
        found, tokens = run_batch(state, config, data, list(range(len(data))), forward_only=False)
        gradients = gradients_by_hf_name(state.model.module, folder)

    assert tokens == count
    assert found / count == pytest.approx(total.item() / count, abs=1e-5)
    expected = dict(hf.named_parameters())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients_by_hf_name(model, folder) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    # fc1 is saved in two halves and therefore has no key of its own yet
    keys = {name: getattr(entry, "key", name) for name, entry in sharded_weights(model).items() if name in parameters}
    ours = {key: parameters[name].main_grad.clone() for name, key in keys.items()}
    return dict(to_hf(ours.__getitem__, read_config(folder / "megatron")))


def test_the_tokens_of_one_sample_do_not_reach_another_of_the_same_pack(models):
    folder, _, store = models
    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        batch = data.batch([next(i for i, pack in enumerate(data.packs) if len(pack) > 1)])
        before, _ = forward_step(iter([batch]), state.model)
        end = int(batch["cu_seqlens"][1])
        batch["tokens"][0, :end] = (batch["tokens"][0, :end] + 1) % VOCAB
        after, _ = forward_step(iter([batch]), state.model)
    own = int(batch["loss_mask"][0, :end].sum())
    assert torch.equal(before[own:], after[own:])
    assert not torch.isclose(before[:own], after[:own]).all()


def test_the_loss_is_the_same_in_one_chunk_and_in_many(models, monkeypatch):
    folder, _, store = models
    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        losses, norms = [], []
        for chunk in (10_000, 7):
            monkeypatch.setattr("rsft_lib.model.gpt.LOSS_CHUNK", chunk)
            state.model.zero_grad_buffer()
            losses.append(run_batch(state, config, data, [0, 1, 2, 3], forward_only=False))
            norms.append(torch.stack([p.main_grad.norm() for p in state.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(norms[0], norms[1])
