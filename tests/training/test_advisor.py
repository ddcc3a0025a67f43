"""The advisor's predictions against trainings that were measured, and the layout that it chooses."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import forked
import pytest
from model_menu import LENGTH, MEASURED, TRACES, run, shape
from real import needs_real
from support import ROOT, random_store, settings, tiny_model
from transformers import AutoConfig

from rsft_lib.checkpoint.convert import convert
from rsft_lib.model.config import read_config
from rsft_lib.training import advisor, flops, rates
from rsft_lib.training import preflight as preflight_module
from rsft_lib.training.advisor import USABLE, advise, laid_out, table
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.datasets import open_datasets
from rsft_lib.training.memory import GIB, memory, recomputed_shares
from rsft_lib.training.metrics import read_metrics
from rsft_lib.training.preflight import check_model, preflight
from rsft_lib.training.rates import H100, rates_file, read_rates
from rsft_lib.training.step_time import step_time

SMALL, LARGE = shape("r1-1.5b"), shape("r1-7b")
H200 = dataclasses.replace(H100, copy=4.24e12)
# Measured with the layers of then, which needed less for a recomputed layer's backward pass.
LESS_MEMORY_THEN = [one for one in MEASURED if (one.length, one.gpus, one.device) == (65_536, 1, "H100")]


@pytest.mark.parametrize("one", MEASURED, ids=lambda one: f"{one.project} {one.gpus} {one.length}")
def test_time_and_memory_are_predicted_within_10_and_5_percent(one):
    model, known = shape(one.project), {"H100": H100, "H200": H200}[one.device]
    known = dataclasses.replace(known, links={one.gpus: math.inf}) if one.alone else known
    config = run(one.length, one.packs, **one.layout)
    seconds = step_time(config, model, one.gpus, known, one.sample).total
    assert one.packs * one.length / one.gpus / seconds == pytest.approx(one.tokens_per_second, rel=0.1)
    tolerance = 0.1 if one in LESS_MEMORY_THEN else 0.05
    assert memory(config, model, one.gpus).total / GIB == pytest.approx(one.gib, rel=tolerance)


@pytest.mark.parametrize("project", ["r1-1.5b", "r1-7b"])
def test_of_the_layouts_that_were_measured_it_prefers_the_fastest(project):
    same = [one for one in MEASURED if (one.project, one.gpus, one.length) == (project, 4, LENGTH) and not one.alone]
    times = {step_time(run(LENGTH, 32, **one.layout), shape(project), 4, H100, TRACES).total: one for one in same}
    assert times[min(times)] == max(same, key=lambda one: one.tokens_per_second)


def test_advice_fits_is_sorted_and_says_why():
    advice = advise(run(16_384, 128), LARGE, 4, H100, TRACES)
    assert all(one.nbytes < 0.92 * H100.memory for one in advice)
    assert advice[0].time.total <= min(one.time.total for one in advice) * 1.05
    config = advice[0].config
    assert one_of(config) in {one_of(one.config) for one in advice} and config.data_parallel(4)
    text = table(advice, LARGE, 4, H100, TRACES)
    assert re.search(r"bf16 moments and gradients is [\d.]+% faster, not enough for less precise states", text)
    text = table(advise(run(16_384, 128), SMALL, 4, H100, TRACES), SMALL, 4, H100, TRACES)
    assert "replicas is best: its step is products 58%" in text
    assert "PP2 takes 12% more, most of it for products" in text


def test_short_packs_are_taken_together_so_that_the_cpu_keeps_up_with_the_gpu():
    advice = advise(run(4096, 512), SMALL, 1, H100, 4096)
    alone = next(one for one in advice if one.config.micro_batch_size == 1)
    best = advice[0]
    assert best.config.micro_batch_size > 1 and best.time.host == 0 < alone.time.host
    assert alone.time.total > 1.5 * best.time.total
    assert advise(run(LENGTH, 128), SMALL, 4, H100, TRACES)[0].config.micro_batch_size == 1


def one_of(config: TrainConfig) -> tuple:
    return tuple(config.layout().items())


def test_with_room_for_all_states_and_activations_nothing_is_recomputed_or_rounded():
    best = advise(run(16_384, 128), SMALL, 4, H100, TRACES)[0].config
    assert (best.recompute, best.moments, best.gradients, best.data_parallel(4)) == ("none", "fp32", "fp32", 4)


def test_as_few_layers_as_possible_are_recomputed():
    advice = advise(run(LENGTH, 128), LARGE, 16, H100, TRACES)
    some = [one for one in advice if one.config.recompute_layers]
    assert {one.config.recompute for one in some} == {"selective", "full"}
    for one in some:
        fewer, below = one.config.recompute_layers - 1, "none" if one.config.recompute == "selective" else "selective"
        fewer = {"recompute_layers": fewer} if fewer else {"recompute_layers": 0, "recompute": below}
        less = dataclasses.replace(one.config, **fewer)
        assert memory(less, LARGE, 16).total > USABLE * H100.memory > one.nbytes
        assert step_time(less, LARGE, 16, H100, TRACES).total < one.time.total
    assert {
        one.config.recompute_layers for one in advise(run(LENGTH, 128, recompute="selective"), LARGE, 16, H100)
    } == {0}


def test_the_shares_of_recomputed_layers_are_of_a_chunk_of_a_stage():
    chunks = {"pipeline_parallel": 2, "virtual_pipeline": 7}
    found = [
        recomputed_shares(run(LENGTH, 128, recompute=kind, recompute_layers=layers, **chunks), LARGE)
        for kind, layers in (("full", 1), ("selective", 1), ("selective", 9), ("full", 0))
    ]
    expected = [(0, 0.5, 0.5), (0.5, 0.5, 0), (0, 1, 0), (0, 0, 1)]
    assert found == [dict(zip(("none", "selective", "full"), shares, strict=True)) for shares in expected]


def test_a_model_that_fits_in_no_layout_is_refused_with_the_smallest():
    small = dataclasses.replace(H100, memory=8 * GIB)
    with pytest.raises(
        ValueError, match=r"no layout fits 2 GPUs of 7\.4 usable GiB at seq_length=16384: the smallest, "
    ):
        advise(run(16_384, 128), SMALL, 2, small)
    with pytest.raises(
        ValueError, match="no layout is possible for 3 GPUs with global_batch_size=128: .* divisible by 3"
    ):
        advise(run(16_384, 128), SMALL, 3, H100)


def test_auto_takes_the_best_layout_for_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "store", samples=20)
    given = settings(checkpoint=str(tmp_path / "megatron"), data=str(tmp_path / "store"), output="o", recompute="full")
    assert laid_out(given, "given", 2) == given
    found = laid_out(given, "auto", 2)
    assert found == dataclasses.replace(given, micro_batch_size=2)  # all packs of a rank
    shown = capsys.readouterr().out
    assert "is best" in shown and "as set: recompute=full\n" in shown


@pytest.mark.parametrize(
    "by_hand",
    [
        {"recompute": "selective", "recompute_layers": 20},
        {"recompute": "full", "moments": "bf16"},
        {"tensor_parallel": 2, "sequence_parallel": True, "tensor_overlap": True},
        {"pipeline_parallel": 4, "virtual_pipeline": 7},
        {"context_parallel": 4, "gradients": "bf16", "micro_batch_size": 2},
    ],
)
def test_what_is_set_by_hand_is_kept(by_hand):
    for one in advise(run(LENGTH, 128, **by_hand), LARGE, 8, H100, TRACES):
        assert {key: getattr(one.config, key) for key in by_hand} == by_hand


def test_a_run_resumes_in_the_best_layout_of_another_number_of_ranks(tmp_path, monkeypatch):
    tiny_model(tmp_path / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
    random_store(tmp_path / "data")
    place = {"checkpoint": str(tmp_path / "hf"), "data": str(tmp_path / "data"), "output": str(tmp_path / "run")}
    given = settings(**place, precision="bf16")
    enough = memory(given, read_config(tmp_path / "hf"), ranks=2).total  # for the states of two ranks in float32
    monkeypatch.setattr(advisor, "read_rates", lambda: dataclasses.replace(H100, memory=int(1.01 * enough / USABLE)))
    for ranks, steps, moments in ((1, 2, "bf16"), (2, 4, "fp32")):
        config = laid_out(dataclasses.replace(given, train_iters=steps), "auto", ranks)
        assert config.moments == moments
        forked.train(config, ranks)
    assert "moments: was 'bf16', now 'fp32'" in (tmp_path / "run" / "train.log").read_text()
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("nproc", "nodes"), [(2, 8), (4, 4), (8, 2)])
def test_ranks_that_exchange_much_are_on_one_machine(nproc, nodes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape("r1-14b").save_pretrained(tmp_path)
    store = str(random_store(tmp_path / "store", samples=40, longest=16_000))
    given = dataclasses.replace(run(LENGTH, 128), checkpoint=str(tmp_path), data=store)
    found = laid_out(given, "auto", nproc, nodes)
    assert nproc % (found.tensor_parallel * found.context_parallel) == 0
    assert found.data_parallel(16)


def test_experts_are_partitioned_among_the_ranks_of_one_machine():
    experts = AutoConfig.for_model("qwen3_moe", num_hidden_layers=4)
    sizes = lambda per_node: {  # noqa: E731
        one.config.expert_parallel
        for one in advise(run(LENGTH, 128), experts, 16, dataclasses.replace(H100, gpus_per_node=per_node))
    }
    assert sizes(4) == {1, 2, 4} and sizes(16) == {1, 2, 4, 8, 16}
    long = [one.config for one in advise(run(2**19, 128), experts, 16, H100)]
    assert {one.recompute_layers for one in long if one.recompute == "full"} == {0}
    with pytest.raises(
        ValueError, match="recompute_layers=1 with recompute 'full' is not possible for a model with expe"
    ):
        check_model(run(LENGTH, 128, recompute="full", recompute_layers=1), experts)


def test_the_buffers_of_overlapped_tensor_parallelism_are_counted():
    tp2 = {"tensor_parallel": 2, "sequence_parallel": True}
    with_buffers, without = (memory(run(LENGTH, 8, **tp2, tensor_overlap=on), SMALL, 2).total for on in (True, False))
    assert with_buffers - without == 12 * LENGTH * SMALL.hidden_size * 2


@needs_real
def test_one_rank_of_many_trains_by_itself(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "train_multi.py"), "--output", str(tmp_path), "--gpus", "4"]
    command += ["--small", "--one-rank", "3", "--sections", "32b-tp2-pp2-cp4"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads((tmp_path / "32b-tp2-pp2-cp4.json").read_text())
    assert result["gpus"] == 16 and result["alone"] and result["tokens_per_second"] > 0 and "32b-tp2-pp2-cp4" in shown


def test_the_time_that_is_stated_before_a_run_is_the_advisors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    SMALL.save_pretrained(tmp_path / "hf")
    store = str(random_store(tmp_path / "store", samples=40, longest=16_000))
    given = {"checkpoint": str(tmp_path / "hf"), "data": store, "output": str(tmp_path / "run"), "split": "1,0,0"}
    config = dataclasses.replace(run(LENGTH, 8), **given)
    assert "unknown for this device" in preflight(config, 1)
    steps = []
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"):
        for module in (flops, rates, preflight_module):
            monkeypatch.setattr(module, "gpu", lambda name=name: (name, 80 * GIB))
        for nodes, changes in ((1, {}), (2, {"pipeline_parallel": 4})):
            one, known = dataclasses.replace(config, **changes), dataclasses.replace(read_rates(), gpus_per_node=2)
            best = advise(one, SMALL, 2 * nodes, known, open_datasets(config).train.sample_length)[0]
            assert f"about {best.time.total:.1f} s per step" in preflight(best.config, 2, nodes)
        steps.append(best.time)
    assert steps[1].products / steps[0].products == pytest.approx(989 / 312)
    assert "in proportion to the peak of this NVIDIA A100" in preflight(config, 1)
    rates_file().parent.mkdir(parents=True)
    rates_file().write_text("[]")
    assert "unknown: " in preflight(config, 1) and "is not a file of rates" in preflight(config, 1)


def test_rates_are_measured_once_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_rates() == H100 and rates.rates_file().parent == tmp_path / "rsft_lib"
    command = [sys.executable, "-m", "rsft_lib.training.rates", "--gpus", "2"]
    subprocess.run(command, check=True)
    found = read_rates()
    assert found.device == "cpu" and found.source == str(rates.rates_file()) and list(found.links) == [2]
    assert min(found.products, found.attention, found.copy, found.links[2], found.link(8)) > 0
    rates.rates_file().write_text("[]")
    with pytest.raises(ValueError, match="is not a file of rates"):
        read_rates()
    assert subprocess.run([*command, "--output", str(tmp_path)], check=False).returncode == 1  # it is a folder


def test_the_command_prints_the_table(tmp_path):
    LARGE.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "rsft_lib.training.advisor", str(tmp_path), "--gpus", "4"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "tokens/s/GPU" in shown and "rates:" in shown and "is best" in shown
    missing = subprocess.run([*command[:3], "some/model"], capture_output=True, text=True)
    assert missing.returncode == 2 and "some/model/config.json does not exist" in missing.stderr
