"""The kinds of trained tokens, and the metrics by kind."""

import numpy as np
import pytest
import torch

from rsft_lib import demo
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.span_kinds import MODE_NAMES, SPAN_NAMES, Control, control_tokens, kinds
from rsft_lib.data.store import StoreWriter, TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.model.loss_head import Loss
from rsft_lib.tokenizer.dialect import Opening
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.loss_stats import SIZE, metrics, tally, trained_tokens, weight_sum

THINK, SHORT, END, EOS, WORD = 1, 2, 3, 4, 9
ALONE = (Opening((THINK,)), Opening((SHORT,)))
CONTROL = Control((THINK, SHORT), END, EOS, THINK, ALONE)


def named(found: np.ndarray) -> list[str]:
    return [f"{MODE_NAMES[kind // len(SPAN_NAMES)]}/{SPAN_NAMES[kind % len(SPAN_NAMES)]}" for kind in found]


def test_modes_and_spans_of_a_conversation():
    """
    labels   9  <think> 9 9 </think> 9 <eos>  9  <short> 9 <eos>
    trained  0     1    1 1    1     1   1    0     1    1   1
    """
    labels = np.array([WORD, THINK, WORD, WORD, END, WORD, EOS, WORD, SHORT, WORD, EOS])
    trained = np.array([0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1], dtype=bool)
    expected = ["think/control", "think/think", "think/think", "think/think", "think/answer", "think/eos"]
    expected += ["short/control", "short/answer", "short/eos"]
    assert named(kinds(labels, trained, CONTROL)[trained]) == expected


def test_an_answer_in_a_given_mode_is_of_that_mode_and_has_no_choice():
    """
    labels   9  <think> 9 </think> 9 <eos>  9  <short> 9 <eos>
    trained  0     0    1    1     1   1    0     0    1   1
    """
    labels = np.array([WORD, THINK, WORD, END, WORD, EOS, WORD, SHORT, WORD, EOS])
    trained = np.array([0, 0, 1, 1, 1, 1, 0, 0, 1, 1], dtype=bool)
    expected = ["think/think", "think/think", "think/answer", "think/eos", "short/answer", "short/eos"]
    assert named(kinds(labels, trained, CONTROL)[trained]) == expected


def test_an_answer_without_a_control_token_has_another_mode_and_one_without_an_end_is_all_thought():
    answer = np.array([WORD, END, EOS])
    assert named(kinds(answer, np.ones(3, dtype=bool), CONTROL)) == ["other/answer", "other/answer", "other/eos"]
    endless = np.array([THINK, WORD, SHORT])
    assert named(kinds(endless, np.ones(3, dtype=bool), CONTROL)) == ["think/control", "think/think", "think/think"]


def test_control_tokens_are_those_that_the_samples_were_written_with(tmp_path):
    demo.make_model(tmp_path / "model", seed=0)
    patch_tokenizer(tmp_path / "model", tmp_path / "tokenizer", {"<|quad_start|>": "<short>"})
    sources = demo.make_sources(tmp_path / "sources", 3, seed=0)
    tokenize(sources / "long.jsonl", tmp_path / "tokenizer", tmp_path / "known", workers=0)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.convert_tokens_to_ids(["<think>", "<short>", "</think>"])
    assert control_tokens(TokenStore(tmp_path / "known")) == Control(
        tuple(ids[:2]), ids[2], tokenizer.eos_token_id, ids[0], tuple(Opening((token,)) for token in ids[:2])
    )
    with new_folder(tmp_path / "unknown", {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        writer.add([1, 2], [0, 1])
        writer.close()
    assert control_tokens(TokenStore(tmp_path / "unknown")) is None


def test_a_batch_names_the_kind_of_every_trained_label(tmp_path):
    with new_folder(tmp_path / "store", {"made_by": "tokenize"}) as temporary:
        writer = StoreWriter(temporary)
        writer.add([WORD, SHORT, WORD, EOS], [0, 1, 1, 1])
        writer.close()
    batch = PackedDataset(TokenStore(tmp_path / "store"), 5, seed=0, control=CONTROL).batch([0])
    assert named(batch["kinds"][0, :3].numpy()) == ["short/control", "short/answer", "short/eos"]


def test_metrics_are_means_over_the_tokens_of_a_kind():
    found = kinds(
        np.array([THINK, WORD, END, EOS, SHORT, WORD, EOS]), np.array([1, 1, 1, 1, 1, 1, 1], dtype=bool), CONTROL
    )
    # one run of trained labels is one answer: two answers need a gap
    first = kinds(np.array([THINK, WORD, END, EOS]), np.ones(4, dtype=bool), CONTROL)
    second = kinds(np.array([SHORT, WORD, EOS]), np.ones(3, dtype=bool), CONTROL)
    assert not np.array_equal(found, np.concatenate([first, second]))
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    think = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2, 0.5, 0.5]).log()
    short = torch.tensor([0.05, 0.5, 0.5, 0.5, 0.6, 0.5, 0.5]).log()
    loss = Loss(torch.tensor(14.0), torch.stack([-losses, think, short], dim=1))
    weights = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.0])
    counts = tally(loss, weights, torch.from_numpy(np.concatenate([first, second])).long())
    result = metrics((2 * counts).tolist())  # two such micro-batches
    assert result == pytest.approx(
        {
            "loss": 7.0,
            "loss_mode_think": 2.5,
            "loss_mode_short": 6.0,
            "loss_span_control": 3.0,
            "loss_span_think": 2.5,
            "loss_span_answer": 6.0,
            "loss_span_eos": 5.5,
            "p_think_when_think": 0.9 / 0.95,
            "p_think_when_short": 0.25,
            "think_share": 0.5,
        },
        rel=1e-5,
    )
    assert weight_sum(counts.tolist()) == 2.0 and trained_tokens(counts.tolist()) == 7
    assert metrics(counts.tolist(), "eval_", kinds=False) == {"eval_loss": 7.0}
    assert metrics([0.0] * SIZE) == {"loss": 0.0}


def test_an_answer_goes_on_after_a_forced_close_and_an_untrained_answer_is_none():
    """
    labels   9  <think> 9 </think> 9 <eos>  9  <think> 9 </think> 9 <eos>  9  <short> 9 <eos>
    trained  0     1    1    0     1   1    0     0    0    0     0   0    0     1    1   1
    """
    long = [WORD, THINK, WORD, END, WORD, EOS]
    labels = np.array([*long, *long, WORD, SHORT, WORD, EOS])
    trained = np.array([0, 1, 1, 0, 1, 1, *[0] * 6, 0, 1, 1, 1], dtype=bool)
    expected = ["think/control", "think/think", "think/answer", "think/eos"]
    expected += ["short/control", "short/answer", "short/eos"]
    found = kinds(labels, trained, CONTROL)
    assert named(found[trained]) == expected and not found[~trained].any()
