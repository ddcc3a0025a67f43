"""The samples of a step, and their tensors."""

import numpy as np
import pytest
import torch
from support import random_store

from rsft_lib.common.artifact import write_manifest
from rsft_lib.data.packed import EMPTY, PackedDataset, rank_share
from rsft_lib.data.store import StoreWriter, TokenStore


@pytest.fixture
def data(tmp_path) -> PackedDataset:
    return PackedDataset(TokenStore(random_store(tmp_path / "store")), seq_length=96, seed=7)


def test_a_batch_holds_its_samples_shifted_by_one_with_positions_restarted(tmp_path):
    """
    sample          5 6 7 8 | mask 0 0 1 1
    tokens          5 6 7 0 0 0
    labels          6 7 8 0 0 0
    loss mask       0 1 1 0 0 0
    positions       0 1 2 0 1 2
    """
    writer = StoreWriter(tmp_path)
    writer.add([5, 6, 7, 8], [0, 0, 1, 1])
    writer.close()
    write_manifest(tmp_path, {"made_by": "tokenize"})
    batch = PackedDataset(TokenStore(tmp_path), seq_length=6, seed=0).batch([0])
    assert batch["tokens"].tolist() == [[5, 6, 7, 0, 0, 0]]
    assert batch["labels"].tolist() == [[6, 7, 8, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 6] and batch["cu_seqlens"].dtype == torch.int32


def test_an_epoch_shows_every_token_once(data):
    seen = [data.batch(data.step(step, 1)) for step in range(len(data))]
    found = torch.cat([b["labels"][b["loss_mask"] == 1] for b in seen])
    samples = [data.store[i] for i in range(len(data.store))]
    expected = np.concatenate([tokens[mask == 1] for tokens, mask in samples])
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert all(b["tokens"].shape == (1, 96) and b["cu_seqlens"][-1] == 96 for b in seen)


def test_epochs_differ_in_order_and_a_seed_repeats_them(data):
    first, second = data.step(0, len(data)), data.step(1, len(data))
    assert sorted(first) == sorted(second) == list(range(len(data)))
    assert first != second
    again = PackedDataset(data.store, 96, seed=7)
    assert again.step(1, len(data)) == second
    assert PackedDataset(data.store, 96, seed=8).step(0, len(data)) != first


def test_a_batch_may_span_two_epochs(data):
    size = len(data) - 1
    assert data.step(1, size)[0] == data.step(0, len(data))[-1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_partition_the_same_global_batch(ranks, micro_batch_size):
    packs, costs = list(range(10, 18)), [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    shares = [rank_share(packs, costs, micro_batch_size, rank, ranks) for rank in range(ranks)]
    assert sorted(pack for share in shares for micro_batch in share for pack in micro_batch) == packs
    assert {len(share) for share in shares} == {8 // micro_batch_size // ranks}
    assert {len(micro_batch) for share in shares for micro_batch in share} == {micro_batch_size}


def test_ranks_and_micro_batches_cost_about_the_same():
    costs = np.random.default_rng(0).lognormal(size=128).tolist()
    packs = list(range(128))
    shares = [rank_share(packs, costs, 4, rank, 8) for rank in range(8)]
    of_micro_batches = [sum(costs[i] for i in micro_batch) for share in shares for micro_batch in share]
    of_ranks = [sum(costs[i] for micro_batch in share for i in micro_batch) for share in shares]
    dealt_round = [sum(costs[rank::8]) for rank in range(8)]
    mean = sum(costs) / 8
    assert max(of_ranks) / mean < 1.03 < 1.5 < max(dealt_round) / mean
    # No micro-batch can cost less than its most expensive pack.
    assert max(of_micro_batches) < 1.1 * max(max(costs), mean / 4)


def test_a_pack_costs_the_squares_of_its_samples(data):
    lengths = [len(data.store[sample][0]) - 1 for sample in data.packs[3]]
    assert data.cost(3) == sum(n**2 for n in lengths) and data.cost(EMPTY) == 0


def test_without_packing_every_sample_has_a_pack_of_its_own(data):
    alone = PackedDataset(data.store, 96, seed=7, packing=False)
    assert alone.packs == [[i] for i in range(len(data.store))]
    batch = alone.batch([4])
    assert batch["cu_seqlens"].tolist() == [0, 96]


def test_some_of_the_samples_keep_their_numbers(data):
    part = PackedDataset(data.store, 96, seed=7, samples=range(50, 60))
    assert sorted(part.samples(range(len(part)))) == list(range(50, 60))


def test_weights_by_sample_sum_to_one_for_each_sample(data):
    by_sample = PackedDataset(data.store, 96, seed=7, normalize_by="sample")
    batch = by_sample.batch([2])
    ends = batch["cu_seqlens"].tolist()[: len(by_sample.packs[2]) + 1]
    sums = [float(batch["loss_mask"][0, a:b].sum()) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert sums == pytest.approx([1.0] * len(sums))
    assert (batch["loss_mask"] > 0).equal(data.batch([2])["loss_mask"] > 0)


def test_the_plan_has_a_hash_that_a_change_of_packing_changes(data):
    again, other = PackedDataset(data.store, 96, seed=1), PackedDataset(data.store, 80, seed=7)
    assert data.plan_sha256() == again.plan_sha256() != other.plan_sha256()


def test_evaluation_covers_the_data_once_and_pads_with_empty_packs(data):
    packs = data.once(0, len(data) + 2)
    assert sorted(packs[: len(data)]) == list(range(len(data))) and packs[len(data) :] == [EMPTY, EMPTY]
    assert packs[:6] == [*data.once(0, 3), *data.once(1, 3)] == PackedDataset(data.store, 96, seed=7).once(0, 6)
    assert data.batch([EMPTY])["loss_mask"].sum() == 0


def test_the_first_batches_of_an_evaluation_are_like_all_of_its_data(data):
    half, lengths = len(data) // 2, data.store.lengths
    longest_first = lengths[data.samples(range(half))].mean()
    evaluated = [PackedDataset(data.store, 96, seed=seed) for seed in range(40)]
    found = np.mean([lengths[one.samples(one.once(0, half))].mean() for one in evaluated])
    assert abs(found - lengths.mean()) < 0.2 * (longest_first - lengths.mean())


def test_a_sample_that_is_too_long_is_named(data):
    longest = int(data.store.lengths.max())
    PackedDataset(data.store, longest - 1, seed=0)
    with pytest.raises(ValueError, match=f"has {longest} tokens, seq_length {longest - 2} allows {longest - 1}"):
        PackedDataset(data.store, longest - 2, seed=0)


def test_a_sample_outlives_its_store(tmp_path):
    random_store(tmp_path / "store")
    tokens, mask = TokenStore(tmp_path / "store")[0]
    assert tokens.sum() >= 0 and mask.max() == 1
