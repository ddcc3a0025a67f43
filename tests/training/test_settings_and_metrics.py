"""Settings, schedule, metrics and alarms of a run."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch
from families import tiny_family
from megatron.core.models.common.embeddings import rope_utils
from support import ROOT, random_store, settings, tiny_model
from transformers import Qwen2Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.chain.project_file import MEMORY, open_project
from rsft_lib.checkpoint.convert import convert
from rsft_lib.launch import LaunchOptions, start_training
from rsft_lib.model import engine
from rsft_lib.model.config import check_layout, read_config
from rsft_lib.model.distributed import TE_BUFFERS, ranks
from rsft_lib.training import alarms, build, expert_stats, flops, metrics
from rsft_lib.training.alarms import FEWEST, Alarms
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.datasets import split
from rsft_lib.training.memory import GIB, memory
from rsft_lib.training.metrics import FILE, MetricsWriter, open_writers, read_metrics
from rsft_lib.training.optimizer import build_schedule
from rsft_lib.training.preflight import preflight

R1 = Qwen2Config(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip

OVERLAP = {"tensor_parallel": 2, "sequence_parallel": True, "tensor_overlap": True, "precision": "bf16"}


def config(**changes):
    return settings(checkpoint="c", data="d", output="o", **changes)


def test_defaults_are_those_of_the_original():
    defaults = TrainConfig(checkpoint="c", data="d", output="o")
    original = {
        "lr": 1e-5, "min_lr": 1e-6, "warmup_fraction": 0.05, "weight_decay": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "clip_grad": 1.0, "global_batch_size": 128, "micro_batch_size": 1, "seq_length": 16384,
        "train_iters": 17000, "save_interval": 1000, "log_interval": 10, "eval_interval": 100, "eval_iters": 10,
        "split": "999,1,0", "precision": "bf16", "overlap": True,
    }  # fmt: skip
    assert {name: getattr(defaults, name) for name in original} == original


def test_every_setting_is_documented_and_the_training_notebook_has_it_as_a_parameter():
    fields = {field.name: field.type.__name__ for field in dataclasses.fields(TrainConfig)}
    source = Path(sys.modules[TrainConfig.__module__].__file__).read_text().splitlines()
    for name in fields:
        (line,) = (i for i, text in enumerate(source) if text.startswith(f"    {name}: "))
        assert source[line + 1].strip().startswith('"""'), name
    declared = declared_parameters(ROOT / "notebooks" / "05_train.ipynb")
    options = {field.name: field.type.__name__ for field in dataclasses.fields(LaunchOptions)}
    assert {
        name: parameter.kind for name, parameter in declared.items() if name not in ("project", "nproc")
    } == fields | options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_iters": 0}, "train_iters is 0"),
        ({"global_batch_size": 1.5}, "global_batch_size is 1.5"),
        ({"global_batch_size": True}, "global_batch_size is True"),
        ({"packing": 1}, "packing is 1; it must be true or false"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": "fast"}, "lr is 'fast'; it must be a finite, non-negative number"),
        ({"backend": None}, "backend is None; it must be a string"),
        ({"min_lr": 1.0}, "min_lr 1.0 is above lr"),
        ({"precision": "fp16"}, "precision is 'fp16'; choose 'bf16', 'fp32', 'fp8'"),
        ({"recompute": "some"}, "choose 'none', 'selective', 'full'"),
        ({"recompute_layers": 1}, "recompute_layers=1 needs recompute 'selective' or 'full'; it is 'none'"),
        ({"warmup_fraction": 1.1}, "warmup_fraction is 1.1"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0; it must be below 1"),
        ({"precision": "fp8", "backend": "torch"}, "needs Transformer Engine; backend is 'torch'"),
        ({"backend": "te"}, "backend 'te' has no attention in precision 'fp32'"),
        ({"moments": "bf16"}, "precision is 'fp32'"),
        ({"sequence_parallel": True}, "sequence_parallel needs tensor_parallel above 1"),
        ({"tensor_overlap": True, "tensor_parallel": 2}, "tensor_overlap needs sequence_parallel"),
        (OVERLAP | {"tensor_parallel": 3}, "tensor_overlap needs tensor_parallel 2, 4 or 8; it is 3"),
        (OVERLAP | {"precision": "fp32"}, "tensor_overlap needs Transformer Engine: .* precision 'bf16' or 'fp8'"),
        (OVERLAP | {"backend": "torch"}, "tensor_overlap needs Transformer Engine: backend 'auto' or 'te'"),
        (OVERLAP | {"precision": "fp8", "fp8_recipe": "blockwise"}, "choose fp8_recipe 'tensorwise' or 'delayed'"),
        ({"virtual_pipeline": 2}, "virtual_pipeline needs pipeline_parallel above 1"),
        ({"context_parallel": 5}, "seq_length=96 x micro_batch_size=1 is not divisible by context_parallel=5"),
        (
            {"sequence_parallel": True, "tensor_parallel": 5},
            "the 96 tokens of a context-parallel rank are not divisible by tensor_parallel=5",
        ),
        ({"keep_every": 5}, "keep_every=5 is not a multiple of save_interval=1000"),
        ({"keep_every": 2000}, "keep_every needs keep_last"),
        ({"keep_best": "loss"}, "keep_best is 'loss'; it must be a held-out loss such as 'eval_loss'"),
        ({"keep_best": "think_tokens"}, "keep_best is 'think_tokens'; it must be"),
        ({"keep_best": "choice_accuracy"}, "keep_best=choice_accuracy needs eval_generate_every, which is 0"),
        (
            {"keep_best": "eval_maht_loss", "eval_more": "math -> folder"},
            "keep_best is 'eval_maht_loss', but the held-out losses are eval_loss, eval_math_loss",
        ),
        (
            {"keep_best": "eval_math_loss", "eval_more": "math -> folder", "save_interval": 250},
            "save_interval=250 is not a multiple of eval_interval=100: checkpoints would have no eval_math_loss",
        ),
        ({"eval_more": "a folder"}, "expected `this -> that`"),
        ({"eval_more": "my set -> a folder"}, "eval_more has the name 'my set'; use letters, digits, - and _"),
        ({"split": "9,1"}, "split is '9,1'; it must be three numbers"),
    ],
)
def test_an_invalid_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_setting_that_needs_a_missing_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        config(tensorboard=True)
    with pytest.raises(ValueError, match="pip install wandb"):
        config(wandb_project="mine")


def test_ranks_that_do_not_fit_are_refused_before_anything_starts():
    assert config(tensor_parallel=2).data_parallel(8) == 4
    assert config(tensor_parallel=2, context_parallel=2).data_parallel(8) == 2
    with pytest.raises(ValueError, match="3 ranks are not divisible by tensor_parallel=2 x pipeline_parallel=1"):
        config(tensor_parallel=2).data_parallel(3)
    with pytest.raises(ValueError, match="global_batch_size=4 is not divisible by micro_batch_size=1 x 3"):
        config().data_parallel(3)
    with pytest.raises(ValueError, match="needs the 4 micro-batches of a rank to be divisible by pipeline_parallel=3"):
        config(pipeline_parallel=3, virtual_pipeline=2).data_parallel(3)


def test_tensor_parallel_ranks_that_overlap_must_be_on_one_machine(tmp_path):
    four = OVERLAP | {"tensor_parallel": 4, "checkpoint": "c", "data": "d", "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="ranks on one machine: nproc=2 is not divisible by tensor_parallel=4"):
        start_training(settings(**four), 2, LaunchOptions(launcher="slurm", slurm_nodes=2))
    assert not (tmp_path / "run").exists()


class Built(Exception):
    """Ends `build_state` before there are layers, which would need Transformer Engine."""


def test_tensor_overlap_reaches_megatron_core_and_the_buffers_of_transformer_engine(tmp_path, monkeypatch):
    tiny_model(tmp_path)
    given = config(**OVERLAP, context_parallel=2, micro_batch_size=3)
    settings_of = lambda changed: build.model_settings(changed, read_config(tmp_path))  # noqa: E731
    assert not settings_of(dataclasses.replace(given, tensor_overlap=False)).tp_comm_overlap
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="tensor_overlap needs CUDA GPUs and transformer-engine"):
            settings_of(given)

    calls, names = [], types.SimpleNamespace(FP8="fp8", NONE="none")
    initialize = lambda *given, **more: calls.append((*given, more["quantization_modes"]))  # noqa: E731
    te = {"UserBufferQuantizationMode": names, "initialize_ub": initialize, "destroy_ub": lambda: calls.append("freed")}
    monkeypatch.setitem(sys.modules, TE_BUFFERS, types.SimpleNamespace(**te))
    monkeypatch.setattr(build, "resolve_backend", lambda *_: "te")
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print)  # megatron-core looks for it
    monkeypatch.setattr(build, "_wrapped", raises(Built))
    for precision in ("bf16", "fp8"):
        overlapping = settings_of(dataclasses.replace(given, precision=precision))
        assert overlapping.tp_comm_overlap and overlapping.sequence_parallel
        with pytest.raises(Built):
            build.build_state(dataclasses.replace(given, precision=precision), tmp_path)
    tokens, hidden = 96 * 3 // 2, read_config(tmp_path).hidden_size
    assert calls == [([tokens, hidden], 2, [mode]) for mode in ("none", "fp8")]
    with ranks():
        pass
    assert calls[2:] == ["freed"]


def raises(error: type[Exception]):
    def function(*_):
        raise error

    return function


def test_a_model_that_cannot_be_partitioned_is_refused():
    check_layout(R1, tensor_parallel=4, pipeline_parallel=7, virtual_pipeline=2)
    message = "num_hidden_layers=28 is not divisible by pipeline_parallel=4 x virtual_pipeline=2"
    with pytest.raises(ValueError, match=message):
        check_layout(R1, tensor_parallel=1, pipeline_parallel=4, virtual_pipeline=2)
    with pytest.raises(ValueError, match="num_attention_heads=12 is not divisible by tensor_parallel=8"):
        check_layout(R1, tensor_parallel=8, pipeline_parallel=1)


def test_settings_come_from_json_and_from_yaml(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config().to_json()))
    assert TrainConfig.from_file(path) == config()
    path.write_text(json.dumps(config().to_json() | {"seq_lenght": 1}))
    with pytest.raises(ValueError, match="unknown setting 'seq_lenght'; did you mean seq_length?"):
        TrainConfig.from_file(path)
    text = tmp_path / "run.yaml"
    text.write_text("checkpoint: c\ndata: d\noutput: o\nlr: 2e-5\npacking: false\n")  # YAML parses 2e-5 as a string
    read = TrainConfig.from_file(text)
    assert (read.lr, read.packing) == (2e-5, False)
    text.write_text("- lr\n")
    with pytest.raises(ValueError, match="holds a list"):
        TrainConfig.from_file(text)


def test_epochs_become_iterations_when_the_data_is_known():
    given = TrainConfig(checkpoint="c", data="d", output="o", epochs=1.5, global_batch_size=10)
    assert given.for_packs(100).train_iters == 15 and given.for_packs(1).train_iters == 1
    assert config(train_iters=7).for_packs(100).train_iters == 7
    once = config(train_iters=7, epochs=2.0).for_packs(10)
    assert (once.train_iters, once.epochs) == (5, 2.0) and once.for_packs(10) == once


def test_the_split_is_megatrons():
    assert [len(part) for part in split(1000, "999,1,0")] == [999, 1, 0]
    assert [len(part) for part in split(120, "999,1,0")] == [120, 0, 0]
    parts = split(10, "6,2,2")
    assert [i for part in parts for i in part] == list(range(10))
    assert [len(part) for part in parts] == [6, 2, 2]


SCHEDULES = {  # the learning rate at step n of 11 to 100, as a share of the way from min_lr to lr
    "constant": lambda n: 1.0,
    "linear": lambda n: 1 - (n - 10) / 90,
    "cosine": lambda n: (1 + math.cos(math.pi * (n - 10) / 90)) / 2,
    "wsd": lambda n: min(1.0, (100 - n) / 20),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_warms_up_and_decays_to_its_end(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    run = config(lr=1.0, min_lr=0.1, train_iters=100, warmup_fraction=0.1, lr_schedule=name, decay_fraction=0.2)
    schedule, rates = build_schedule(run, optimizer), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert rates[10:] == pytest.approx([0.1 + 0.9 * SCHEDULES[name](n) for n in range(11, 101)])


def test_metrics_after_the_resumed_checkpoint_are_removed(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for iteration in (1, 2, 3):
        writer.write(iteration=iteration, loss=1 / iteration)
    MetricsWriter(tmp_path, 2).write(iteration=3, loss=9.0)
    assert [(r["iteration"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    MetricsWriter(tmp_path, 0).write(iteration=1, loss=2.5)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"iteration": 2, "lo')
    assert read_metrics(tmp_path) == [{"iteration": 1, "loss": 2.5}]
    (tmp_path / "no step yet").mkdir()
    assert read_metrics(tmp_path / "no step yet") == []


def test_nan_and_infinity_become_null(tmp_path):
    MetricsWriter(tmp_path, 0).write(iteration=1, loss=math.nan, lr=math.inf)
    assert (tmp_path / FILE).read_text() == '{"iteration": 1, "loss": null, "lr": null}\n'


def test_tensorboard_and_wandb_receive_the_metrics_and_continue_after_a_resume(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def close(self):
            calls.append("closed")

    class Session:
        id = "abc"
        log = staticmethod(lambda values, step: calls.append((values, step)))
        finish = staticmethod(lambda: calls.append("finished"))

    asked = []
    wandb = types.SimpleNamespace(init=lambda **given: asked.append((given["id"], given["resume"])) or Session)
    board = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for iteration in (0, 5):
        writers = open_writers(tmp_path, iteration, config(tensorboard=True, wandb_project="mine"))
        assert [type(writer) for writer in writers] == [MetricsWriter, metrics.TensorBoard, metrics.Wandb]
        for writer in writers:
            writer.write(iteration=iteration + 1, loss=2.0, samples_sha256="0f")
            writer.close()
    assert calls[:2] == [("tensorboard", 0), ("loss", 2.0, 1)]
    assert ("tensorboard", 6) in calls and ("loss", 2.0, 6) in calls
    assert ({"loss": 2.0, "samples_sha256": "0f"}, 6) in calls
    assert asked == [(None, "allow"), ("abc", "allow")]


def test_a_loss_spike_raises_an_alarm_and_noise_does_not():
    watch = Alarms()
    noise = [2.0 + 0.05 * math.sin(7 * step) for step in range(50)]
    assert [watch.look({"loss": loss}) for loss in noise] == [[]] * 50
    (found,) = watch.look({"loss": 3.0})
    assert "loss spike: loss 3.0000" in found


def test_the_rare_wrong_token_of_a_mode_with_few_tokens_is_no_spike_but_a_loss_that_stays_high_is():
    watch = Alarms()
    rare = [0.02 + (0.9 if step % 50 == 9 else 0.0) for step in range(209)]
    assert [watch.look({"loss": loss}) for loss in rare] == [[]] * 209
    assert [bool(watch.look({"loss": 1.2})) for _ in range(3)] == [False, False, True]


def test_a_step_of_one_mode_is_not_a_spike_but_a_jump_within_a_mode_is():
    def step(number: int, think: bool = True, short: float = 0.7) -> dict:
        losses = {"loss_mode_think": 0.1 + 0.01 * math.sin(7 * number)} if think else {}
        return {"loss": 0.2 if think else short, **losses, "loss_mode_short": short + 0.01 * math.sin(5 * number)}

    watch = Alarms()
    assert [watch.look(step(number, think=number % 30 != 29)) for number in range(100)] == [[]] * 100
    (found,) = watch.look(step(0, short=1.4))
    assert found.startswith("loss spike: loss_mode_short 1.4000 after a mean of ")


@pytest.mark.parametrize(("think", "mode"), [(0.999, "<short>"), (0.001, "<think>")])
def test_mode_collapse_raises_an_alarm(think, mode):
    watch = Alarms()
    record = {"loss": 1.0, "think_share": 0.4, "p_think_when_think": think, "p_think_when_short": think}
    messages = [watch.look(record) for _ in range(alarms.FEWEST)]
    assert messages[:-1] == [[]] * (alarms.FEWEST - 1)
    assert f"mean probability of {mode} is" in messages[-1][0]
    healthy = Alarms()
    record |= {"p_think_when_think": 0.4, "p_think_when_short": 0.4}
    assert [healthy.look(record) for _ in range(100)] == [[]] * 100
    single = Alarms()  # no alarm if the data only has one mode
    record = {"loss": 1.0, "think_share": 1.0, "p_think_when_think": 1.0}
    assert [single.look(record) for _ in range(100)] == [[]] * 100


def test_flops_are_counted_as_nvidia_does():
    assert flops.matmul_parameters(R1) == 1_543_569_408 and flops.parameters(R1) == 1_776_943_104
    per_token = flops.training_flops(R1, 16384, 16384**2) / 16384
    assert per_token == pytest.approx(6 * 1_543_569_408 + 6 * 28 * 1536 * 16384)


def test_the_memory_estimate_is_that_of_the_ledger():
    full = memory(TrainConfig(checkpoint="c", data="d", output="o"), R1, ranks=1)
    assert full.weights + full.gradients + full.optimizer == pytest.approx(16 * 1_776_943_104)
    assert full.total / GIB == pytest.approx(50, abs=3)
    for name, expected in (("", 52), ("saving", 30), ("smallest", 22)):
        run = TrainConfig(checkpoint="c", data="d", output="o", **MEMORY[name])
        assert memory(run, R1, ranks=1).total / GIB < expected, name
    shared = memory(TrainConfig(checkpoint="c", data="d", output="o"), R1, ranks=8)
    assert shared.optimizer == pytest.approx(full.optimizer / 8)


def settings_of(given: dict) -> TrainConfig:
    settings = {name: value for name, value in given.items() if name in TrainConfig.__annotations__}
    return TrainConfig(checkpoint="c", data="d", output="o", **settings)


def test_preflight_estimates_the_cost_of_a_run(tmp_path, monkeypatch):
    tiny_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    random_store(tmp_path / "store")
    run = settings(
        checkpoint=str(tmp_path / "megatron"), data=str(tmp_path / "store"), output=str(tmp_path / "run" / "new"),
        train_iters=30, save_interval=10,
    )  # fmt: skip
    text = preflight(run, nproc=2)
    assert (
        "MiB per rank (weights 0." in text
        and "2 = 2 data" in text
        and "30 steps" in text
        and "3 kept" in text
        and "384 tokens in 4 packs" in text
        and "TOO LITTLE" not in text
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(total=2**16))
    weights = flops.parameters(read_config(run.checkpoint))
    background = dataclasses.replace(run, async_save=True)
    (saving,) = (line for line in preflight(background, nproc=2).splitlines() if line.startswith("saving"))
    assert f"{weights * 16 / 2**20:.1f} MiB of main memory" in saving and "TOO LITTLE" in saving
    for_epochs = preflight(dataclasses.replace(run, epochs=2.0), nproc=2)
    assert "13 steps, 2.1 epochs; epochs=2 overrides train_iters=30" in for_epochs
    with pytest.raises(ValueError, match="is not divisible by micro_batch_size=1 x 3"):
        preflight(run, nproc=3)
    with pytest.raises(ValueError, match="num_hidden_layers=4 is not divisible by pipeline_parallel=3"):
        preflight(dataclasses.replace(run, pipeline_parallel=3), nproc=3)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "new").mkdir(parents=True)
    lines = (
        json.dumps({"iteration": step, "loss": 1.0, "seconds": 60.0 if step == 1 else 12.0}) + "\n"
        for step in range(1, 6)
    )
    (tmp_path / "run" / "new" / "metrics.jsonl").write_text("".join(lines))
    assert "12 s per step as measured before; 25 more steps take 5.0 minutes" in preflight(run, nproc=2)


QWEN3_30B_A3B = {
    "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip


def test_the_parameters_of_a_model_with_experts_are_those_that_its_authors_state():
    model = Qwen3MoeConfig(**QWEN3_30B_A3B)
    assert flops.parameters(model) == pytest.approx(30.5e9, rel=2e-3)
    active = flops.matmul_parameters(model) + model.vocab_size * model.hidden_size
    assert active == pytest.approx(3.3e9, rel=2e-2)  # "3.3B activated", with the embedding
    with torch.device("meta"):
        weights = dict(Qwen3MoeForCausalLM(model).named_parameters())
    assert flops.parameters(model) == sum(w.numel() for name, w in weights.items() if "norm" not in name)
    run = settings(checkpoint="c", data="d", output="o", precision="bf16", seq_length=16_384, global_batch_size=16)
    given = open_project("qwen3-30b-a3b").parameters["05_train"]
    assert memory(settings_of(given), model, given["nproc"]).total < 60e9  # of 80; loads of experts are unequal
    eight, sixteen = (memory(dataclasses.replace(run, expert_parallel=ep), model, ranks=16) for ep in (8, 16))
    experts = 48 * 128 * 3 * 2048 * 768
    assert eight.weights - sixteen.weights == pytest.approx(2 * experts / 16)
    assert eight.optimizer == pytest.approx(sixteen.optimizer)  # sharded over all ranks either way


def test_preflight_reports_the_experts_and_the_auxiliary_loss_that_is_not_used(tmp_path):
    tiny_family(tmp_path / "hf", "qwen3_moe", vocab_size=256)
    random_store(tmp_path / "store")
    run = settings(checkpoint=str(tmp_path / "hf"), data=str(tmp_path / "store"), output=str(tmp_path / "run"))
    text = preflight(dataclasses.replace(run, expert_parallel=2, freeze_router=True), nproc=4)
    assert "8 per layer, 4 per token, none dropped; router in float32, frozen; router_aux_loss 0 (router_aux" in text
    assert "4 = 4 data; 2 of them with different experts" in text
    with pytest.raises(ValueError, match="number of experts=8 is not divisible by expert_parallel=3"):
        preflight(dataclasses.replace(run, expert_parallel=3, global_batch_size=6), nproc=3)
    with pytest.raises(ValueError, match="3 ranks are not divisible by pipeline_parallel=1 x expert_parallel=2"):
        preflight(dataclasses.replace(run, expert_parallel=2, global_batch_size=6), nproc=3)


def test_experts_without_a_token_in_twenty_steps_raise_one_alarm():
    alarms, record = Alarms(), {"loss": 1.0}
    load = torch.tensor([[3, 0, 5], [4, 4, 0]])
    assert not any(alarms.look(record, load) for _ in range(FEWEST - 1))
    assert alarms.look(record, load) == [
        f"dead experts: no token in {FEWEST} steps for expert 1 of layer 0, 2 of layer 1"
    ]
    assert not any(alarms.look(record, load) for _ in range(FEWEST))
    alarms.look(record, load + 1)
    assert not any(alarms.look(record, load) for _ in range(FEWEST - 1)) and alarms.look(record, load)


def test_the_metrics_of_experts_are_relative_to_equal_loads():
    found = expert_stats.metrics(torch.tensor([[4, 0, 2, 2], [2, 2, 2, 2]]))
    assert found == {"expert_load_max": 2.0, "dead_experts": 1, "expert_load": [1.5, 0.5, 1, 1]}
    assert expert_stats.metrics(None) == {}


@pytest.mark.skipif(
    not engine.VERSION.startswith("0.16"), reason="megatron-core after 0.16 imports torch's compiler itself"
)
def test_without_a_gpu_a_rank_starts_without_torchs_compiler():
    code = (
        "import sys, torch, rsft_lib.training.train\n"
        "with rsft_lib.model.cpu_shim.cuda_on_cpu():\n"
        "    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "every rank takes a second longer to start"
