"""megatron-core compared with transformers, tensor by tensor."""

import math
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, tiny_family
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from support import VOCAB, by_hf_name, differing_tensors, logit_difference, random_store, settings, tiny_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.sharded import load_weights, sharded_weights
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import StoreWriter, TokenStore
from rsft_lib.evaluation.score import score
from rsft_lib.evaluation.token_losses import TokenLosses
from rsft_lib.model import loss_head
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.router import expert_load, routers
from rsft_lib.training.batches import Loader, run_batch
from rsft_lib.training.build import build_state
from rsft_lib.training.loop import evaluate, update
from rsft_lib.training.loss import forward_step, micro_batch
from rsft_lib.training.loss_stats import trained_tokens, weight_sum


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request, tmp_path_factory):
    """(folder, the Hugging Face model, a store of samples)"""
    folder = tmp_path_factory.mktemp("parity")
    hf = tiny_model(folder / "hf", tie_word_embeddings=request.param)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "store", samples=30)
    return folder, hf, TokenStore(folder / "store")


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """The same for a model of each family."""
    folder, wide = tmp_path_factory.mktemp(request.param), {"sliding_window": 512} if request.param == "mistral" else {}
    hf = tiny_family(folder / "hf", request.param, vocab_size=VOCAB, **wide)
    convert(folder / "hf", folder / "megatron")
    random_store(folder / "store", samples=30)
    return folder, hf, TokenStore(folder / "store")


def loaded_state(folder, **changes):
    config = settings(
        checkpoint=str(folder / "megatron"), data=str(folder / "store"), output=str(folder / "run"), **changes
    )
    state = build_state(config, folder / "megatron")
    load_weights(state.chunks[0].module, folder / "megatron")
    return config, state


def losses_by_transformers(hf, store) -> list[torch.Tensor]:
    """The loss of each token of each sample except the first token; each sample runs alone."""
    found = []
    for tokens, _ in (store[i] for i in range(len(store))):
        ids = torch.from_numpy(tokens).long()
        found.append(cross_entropy(hf(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    return found


def test_a_converted_checkpoint_has_every_tensor_and_the_logits_of_transformers(models):
    folder, _, _ = models
    assert differing_tensors(folder / "hf", folder / "megatron") == []
    assert logit_difference(folder / "hf", folder / "megatron") < 1e-4


@pytest.mark.parametrize(
    ("family", "normalize_by"), [*((name, "token") for name in FAMILIES), ("qwen2", "sample")], indirect=["family"]
)
def test_packed_loss_and_gradients_match_transformers_sample_by_sample(family, normalize_by):
    folder, hf, store = family
    hf.zero_grad()
    masks = [torch.from_numpy(store[i][1][1:]) for i in range(len(store))]
    sums = [(losses * mask).sum() for losses, mask in zip(losses_by_transformers(hf, store), masks, strict=True)]
    trained = [int(mask.sum()) for mask in masks]
    if normalize_by == "sample":
        expected = sum(total / n for total, n in zip(sums, trained, strict=True)) / len(sums)
    else:
        expected = sum(sums) / sum(trained)
    expected.backward()

    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0, normalize_by=normalize_by)
        assert len(data) < len(store) / 2  # several samples to a pack
        packs = list(range(len(data)))
        state.chunks[0].zero_grad_buffer()
        counts = run_batch(state, Loader(data, config), packs).tolist()
        gradients = gradients_by_hf_name(state.chunks[0].module, folder)
        load = expert_load(state.chunks)

    denominator = weight_sum(counts)
    assert denominator == pytest.approx(len(store) if normalize_by == "sample" else sum(trained), rel=1e-6)
    assert trained_tokens(counts) == sum(trained)
    assert counts[0] / denominator == pytest.approx(expected.item(), abs=1e-5)
    wanted = by_file_name({name: weight.grad for name, weight in hf.named_parameters()}, hf.config)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient / denominator, wanted[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    if load is not None:
        assert load.sum(dim=1).tolist() == routed(store, hf.config)


def routed(store, config) -> list[int]:
    """For each layer, the sum of the experts' tokens if none is dropped and padding is not counted."""
    return [config.num_experts_per_tok * (int(store.lengths.sum()) - len(store))] * config.num_hidden_layers


@pytest.mark.parametrize("family", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tokens_of_experts_are_counted_once_in_training_and_not_in_evaluation(family, recompute):
    folder, hf, store = family
    with ranks():
        config, state = loaded_state(folder, recompute=recompute)
        data = PackedDataset(store, config.seq_length, seed=0)
        packs = list(range(len(data)))
        for chunk in state.chunks:
            chunk.zero_grad_buffer()
        run_batch(state, Loader(data, config), packs)
        assert expert_load(state.chunks).sum(dim=1).tolist() == routed(store, hf.config)
        evaluate(state, config, data, "eval_")
        assert not expert_load(state.chunks).any()
        assert not any(router.to_recompute for router in routers(state.chunks))


def test_the_auxiliary_loss_of_routers_has_the_gradient_of_that_of_transformers(tmp_path):
    hf = tiny_family(tmp_path / "hf", "qwen3_moe", vocab_size=VOCAB, num_hidden_layers=1)  # theirs pools the layers
    convert(tmp_path / "hf", tmp_path / "megatron")
    store = TokenStore(random_store(tmp_path / "store", samples=3, longest=30))
    masks = [torch.from_numpy(store[i][1][1:]) for i in range(3)]
    losses = [(x * mask).sum() for x, mask in zip(losses_by_transformers(hf, store), masks, strict=True)]
    inputs = [torch.from_numpy(store[i][0][:-1]).long()[None] for i in range(3)]
    gates = torch.cat([hf(ids, output_router_logits=True).router_logits[0] for ids in inputs])
    imbalance = load_balancing_loss_func((gates,), num_experts=8, top_k=hf.config.num_experts_per_tok)
    (sum(losses) / sum(int(mask.sum()) for mask in masks) + 0.7 * imbalance).backward()
    with ranks():
        config, state = loaded_state(tmp_path, router_aux_loss=0.7)
        data = PackedDataset(store, config.seq_length, seed=0)
        assert len(data) == 1
        state.chunks[0].zero_grad_buffer()
        counts = run_batch(state, Loader(data, config), [0]).tolist()
        gradients = gradients_by_hf_name(state.chunks[0].module, tmp_path)
    wanted = by_file_name({name: weight.grad for name, weight in hf.named_parameters()}, hf.config)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient / weight_sum(counts), wanted[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_loss_curve_matches_transformers_with_torch_adamw(models):
    folder, _, store = models
    network, losses, expected = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32), [], []
    with ranks():
        config, state = loaded_state(folder, train_iters=12, warmup_fraction=0.25, lr=3e-3, min_lr=1e-3)
        data = PackedDataset(store, config.seq_length, seed=0)
        loader, batches = Loader(data, config), [data.step(i, 4) for i in range(config.train_iters)]
        for packs in batches:
            counts = update(state, loader, packs).counts
            losses.append(counts[0] / weight_sum(counts))
            state.scheduler.step(increment=1)
    matrices, others = ([w for w in network.parameters() if (w.dim() > 1) == decayed] for decayed in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for number, packs in enumerate(batches, start=1):
        chosen = [store[sample] for sample in data.samples(packs)]
        totals = [  # (sum of losses, trained tokens) of each sample, which transformers runs alone
            ((loss * torch.from_numpy(mask[1:])).sum(), int(mask[1:].sum()))
            for loss, (_, mask) in zip(losses_by_transformers(network, chosen), chosen, strict=True)
        ]
        loss = sum(total for total, _ in totals) / sum(n for _, n in totals)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad)
        share = (number - 3) / 9
        rate = 3e-3 * number / 3 if number <= 3 else 1e-3 + 2e-3 * (1 + math.cos(math.pi * share)) / 2
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        adam.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < 0.9 * losses[0]


def test_a_checkpoint_has_no_extra_states_of_transformer_engine():
    """Grouped experts number theirs, and megatron-core refuses to save some of them without the others."""
    states = {name: ShardedObject(name, None, (1,), (0,)) for name in ("experts._extra_state", "experts._extra_state1")}
    weight = ShardedTensor.from_rank_offsets("experts.weight", torch.ones(1))
    model = SimpleNamespace(sharded_state_dict=lambda metadata: {**states, "experts.weight0": weight})
    assert sharded_weights(model) == {"experts.weight0": weight}


def gradients_by_hf_name(model, folder) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    # fc1 is saved in two halves, so its entry has no key yet
    keys = {name: getattr(entry, "key", name) for name, entry in sharded_weights(model).items() if name in parameters}
    ours: dict[str, list[torch.Tensor]] = {}
    for name, key in keys.items():
        ours.setdefault(key, []).append(parameters[name].main_grad.clone())
    stacked = {key: torch.stack(found) if ".experts." in key else found[0] for key, found in ours.items()}
    return by_hf_name(stacked, read_config(folder / "megatron"))


def by_file_name(named: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Tensors by their names in transformers' modules, which stack experts -> by those in its files."""
    place, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if config.model_type == "mixtral":
        place, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    found = {}
    for name, tensor in named.items():
        if ".mlp.experts." not in name:
            found[name.replace(".mlp.", f".{place}.")] = tensor
            continue
        parts = [gate, up] if name.endswith("gate_up_proj") else [down]
        for expert, matrices in enumerate(tensor):
            for part, matrix in zip(parts, matrices.chunk(len(parts)), strict=True):
                found[f"{name.split('.mlp.')[0]}.{place}.experts.{expert}.{part}.weight"] = matrix
    return found


def test_scores_match_the_loss_of_transformers_at_every_trained_token(models, tmp_path):
    folder, hf, store = models
    with ranks():
        score(folder / "megatron", folder / "store", tmp_path / "losses")
    found = TokenLosses(tmp_path / "losses")
    assert len(found) == len(store)
    with torch.no_grad():
        wanted = losses_by_transformers(hf, store)
    for sample, losses in enumerate(wanted):
        ours, trained = torch.from_numpy(found[sample]), torch.from_numpy(store[sample][1]) > 0
        assert ours.isnan().tolist() == (~trained).tolist()
        torch.testing.assert_close(ours[trained], losses[trained[1:]], atol=1e-5, rtol=1e-5)
    random_store(folder / "store", samples=30)  # the same samples written again are the same data
    assert len(TokenLosses(tmp_path / "losses")) == 30


def test_samples_of_a_pack_do_not_attend_to_each_other(models):
    folder, _, store = models
    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        batch = data.batch([next(i for i, pack in enumerate(data.packs) if len(pack) > 1)])
        with torch.no_grad():
            (_, before), _ = forward_step(iter([micro_batch(batch, 0, 1)]), state.chunks[0])
            end = int(batch["cu_seqlens"][1])
            batch["tokens"][0, :end] = (batch["tokens"][0, :end] + 1) % VOCAB
            (_, after), _ = forward_step(iter([micro_batch(batch, 0, 1)]), state.chunks[0])
    own = int((batch["loss_mask"][0, :end] > 0).sum())
    assert torch.equal(before[own:], after[own:])
    assert not torch.isclose(before[:own], after[:own]).all()


def test_the_loss_is_the_same_in_one_chunk_and_in_many(models, monkeypatch):
    folder, _, store = models
    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        losses, norms = [], []
        for chunk in (10_000, 7):
            monkeypatch.setattr(loss_head, "CHUNK", chunk)
            state.chunks[0].zero_grad_buffer()
            losses.append(run_batch(state, Loader(data, config), [0, 1, 2, 3]).tolist())
            norms.append(torch.stack([p.main_grad.norm() for p in state.chunks[0].parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(norms[0], norms[1])


def test_fractional_token_weights_scale_their_losses(models, tmp_path, monkeypatch):
    folder, hf, _ = models
    table = torch.tensor([0.0, 1.0, 0.25]).numpy()
    monkeypatch.setattr(TokenStore, "weights", table, raising=False)
    with new_folder(tmp_path / "weighted", {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        writer.add([5, 6, 7, 8, 9], [0, 0, 2, 1, 2])
        writer.add([3, 4, 5], [0, 1, 2])
        writer.close()
    store = TokenStore(tmp_path / "weighted")
    with torch.no_grad():
        losses = losses_by_transformers(hf, store)
    weights = [torch.from_numpy(table[store[i][1][1:]]) for i in range(2)]
    expected = sum((w * x).sum() for w, x in zip(weights, losses, strict=True)) / sum(w.sum() for w in weights)
    with ranks():
        config, state = loaded_state(folder)
        data = PackedDataset(store, config.seq_length, seed=0)
        counts = run_batch(state, Loader(data, config), [0], forward_only=True).tolist()
    assert weight_sum(counts) == 2.75 and trained_tokens(counts) == 5
    assert counts[0] / 2.75 == pytest.approx(expected.item(), rel=1e-5)
