"""The advisor's predictions against trainings that were measured, and the layout that it chooses."""

import dataclasses
import subprocess
import sys

import pytest
from support import random_store, settings, tiny_model
from transformers import Qwen2Config

from rsft_lib.checkpoint.convert import convert
from rsft_lib.training import rates
from rsft_lib.training.advisor import advise, laid_out, table
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.preflight import GIB, memory
from rsft_lib.training.rates import H100, read_rates
from rsft_lib.training.step_time import step_time

SMALL, LARGE = (
    Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=28,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=False,
    )
    for vocabulary, hidden, ffn, heads, groups in ((151_936, 1536, 8960, 12, 2), (152_064, 3584, 18_944, 28, 4))
)  # fmt: skip
LOW = {"moments": "bf16", "gradients": "bf16"}
TP2, TP4 = ({"tensor_parallel": size, "sequence_parallel": True} for size in (2, 4))
SELECTIVE, FULL = {"recompute": "selective"}, {"recompute": "full"}
TRACES = 10_242  # mean length of a token's sample in the packs of benchmarks/train_gpu.py
MEASURED = {  # on H100s: model, GPUs, tokens of a pack, of a sample, packs of a step, layout, tokens/s of a GPU, GiB
    "1.5B": (SMALL, 1, 16_384, TRACES, 8, {}, 43_180, 51.4),
    "1.5B x 4": (SMALL, 4, 16_384, TRACES, 32, {}, 43_360, 38.8),
    "1.5B TP2": (SMALL, 4, 16_384, TRACES, 16, TP2, 33_800, 21.6),
    "1.5B CP4": (SMALL, 4, 16_384, TRACES, 8, {"context_parallel": 4}, 20_350, 21.6),
    "1.5B CP4 64K": (SMALL, 4, 65_536, 0, 8, {"context_parallel": 4, **SELECTIVE}, 15_165, 24.2),
    "1.5B CP4 128K": (SMALL, 4, 131_072, 0, 8, {"context_parallel": 4, **FULL}, 7_518, 19.5),
    "1.5B 64K": (SMALL, 1, 65_536, 0, 8, {**FULL, **LOW}, 14_693, 26.4),
    "1.5B PP4": (SMALL, 4, 16_384, TRACES, 16, {"pipeline_parallel": 4}, 29_510, 32.7),
    "7B TP2": (LARGE, 4, 16_384, TRACES, 16, {**TP2, **SELECTIVE}, 9_197, 46.8),
    "7B x 4": (LARGE, 4, 16_384, TRACES, 32, {**SELECTIVE, **LOW}, 10_403, 54.2),
    "7B x 4 full": (LARGE, 4, 16_384, TRACES, 32, {**FULL, **LOW}, 9_119, 44.7),
    "7B TP4": (LARGE, 4, 16_384, TRACES, 8, TP4, 9_312, 42.0),
    "7B TP2 PP2": (LARGE, 4, 16_384, TRACES, 16, {"pipeline_parallel": 2, **TP2}, 9_131, 55.0),
    "7B TP4 32K": (LARGE, 4, 32_768, 0, 8, {**TP4, **SELECTIVE}, 6_652, 36.4),
}
H200 = dataclasses.replace(H100, copy=4.24e12)
MEASURED_ON_H200 = {
    "1.5B on an H200": (SMALL, 1, 16_384, TRACES, 8, {}, 43_275, 51.4),
    "1.5B 64K on an H200": (SMALL, 1, 65_536, 0, 2, {**SELECTIVE, **LOW}, 18_437, 46.5),
    "1.5B 128K on an H200": (SMALL, 1, 131_072, 0, 1, {**SELECTIVE, **LOW}, 10_965, 76.4),
    "1.5B 256K on an H200": (SMALL, 1, 262_144, 0, 1, {**FULL, **LOW}, 4_446, 65.3),
}
# Measured with the layers of then, which needed less for a recomputed layer's backward pass.
LESS_MEMORY_THEN = {"1.5B 64K"}


def run(length: int, packs: int, **layout) -> TrainConfig:
    return TrainConfig(checkpoint="c", data="d", output="o", seq_length=length, global_batch_size=packs, **layout)


@pytest.mark.parametrize("name", MEASURED | MEASURED_ON_H200)
def test_time_and_memory_are_predicted_within_10_and_5_percent(name):
    model, gpus, length, sample, packs, layout, per_gpu, gib = (MEASURED | MEASURED_ON_H200)[name]
    known = H200 if name in MEASURED_ON_H200 else H100
    config = run(length, packs, **layout)
    seconds = step_time(config, model, gpus, known, sample).total
    assert packs * length / gpus / seconds == pytest.approx(per_gpu, rel=0.1)
    assert memory(config, model, gpus).total / GIB == pytest.approx(gib, rel=0.1 if name in LESS_MEMORY_THEN else 0.05)


def test_of_the_layouts_that_were_measured_it_prefers_the_fastest():
    for model, names in ((SMALL, ["1.5B x 4", "1.5B TP2", "1.5B CP4", "1.5B PP4"]), (LARGE, ["7B x 4", "7B TP2"])):
        times = {name: step_time(run(16_384, 32, **MEASURED[name][5]), model, 4, H100, TRACES).total for name in names}
        assert min(times, key=lambda name: times[name]) == max(names, key=lambda name: MEASURED[name][6])


def test_advice_fits_is_sorted_and_says_why():
    advice = advise(run(16_384, 128), LARGE, 4, H100, TRACES)
    assert all(one.nbytes < 0.92 * H100.memory for one in advice)
    assert advice[0].time.total <= min(one.time.total for one in advice) * 1.05
    config = advice[0].config
    assert one_of(config) in {one_of(one.config) for one in advice} and config.data_parallel(4)
    assert "not enough for less precise states" in table(advice, LARGE, 4, H100, TRACES)
    text = table(advise(run(16_384, 128), SMALL, 4, H100, TRACES), SMALL, 4, H100, TRACES)
    assert (
        "replicas is best: its step is products 58%" in text and "CP2 takes 10% more, most of it for attention" in text
    )


def one_of(config: TrainConfig) -> tuple:
    return tuple(config.layout().items())


def test_with_room_for_all_states_and_activations_nothing_is_recomputed_or_rounded():
    best = advise(run(16_384, 128), SMALL, 4, H100, TRACES)[0].config
    assert (best.recompute, best.moments, best.gradients, best.data_parallel(4)) == ("none", "fp32", "fp32", 4)


def test_a_model_that_fits_in_no_layout_is_refused_with_the_smallest():
    small = dataclasses.replace(H100, memory=8 * GIB)
    with pytest.raises(ValueError, match=r"no layout fits 2 GPUs of 8.0 GiB at seq_length=16384 .*GiB\. Take more"):
        advise(run(16_384, 128), SMALL, 2, small)
    with pytest.raises(ValueError, match="none is possible"):
        advise(run(16_384, 128), SMALL, 3, H100)


def test_auto_takes_the_best_layout_for_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "store", samples=20)
    given = settings(checkpoint=str(tmp_path / "megatron"), data=str(tmp_path / "store"), output="o", recompute="full")
    assert laid_out(given, "given", 2) == given
    found = laid_out(given, "auto", 2)
    assert found == dataclasses.replace(given, recompute="none") and "is best" in capsys.readouterr().out


def test_rates_are_measured_once_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_rates() == H100 and rates.rates_file().parent == tmp_path / "rsft_lib"
    subprocess.run([sys.executable, "-m", "rsft_lib.training.rates", "--gpus", "2"], check=True)
    found = read_rates()
    assert found.device == "cpu" and found.source == str(rates.rates_file()) and list(found.links) == [2]
    assert min(found.products, found.attention, found.copy, found.links[2], found.link(8)) > 0
    rates.rates_file().write_text("[]")
    with pytest.raises(ValueError, match="is not a file of rates"):
        read_rates()


def test_the_command_prints_the_table(tmp_path):
    LARGE.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rsft_lib.training.advisor", str(tmp_path), "--gpus", "4"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "tokens/s/GPU" in shown and "rates:" in shown and "is best" in shown
