"""Every family at every layout and in every format, compared with transformers."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny_family
from support import TESTS, logit_difference, settings, tiny_tokenizer

from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.verify import lost_in_round_trip
from rsft_lib.model.config import check_layout, read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import build_model
from rsft_lib.model.transformer_config import transformer_config
from rsft_lib.model.weight_map import expert_count
from rsft_lib.training.build import build_state

SIZES = (1, 2, 4)
EVERYWHERE = [family for family in FAMILIES if not family.endswith("-yarn")]  # YaRN is a factor, not a layout


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[tuple[str, str, str], float]:
    """(family, format, TP x PP) -> maximum absolute difference of the logits."""
    folder = tmp_path_factory.mktemp("grid")
    for family in EVERYWHERE:
        here = folder / "models" / family
        model = tiny_family(here / "hf", family)
        ids = torch.randint(250, (1, 48), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save((ids, model(ids).logits), here / "expected.pt")
        convert(here / "hf", here / "torch_dist")
        for tp, pp in [] if expert_count(model.config) else itertools.product(SIZES, SIZES):
            convert(here / "hf", here / "legacy", format="legacy", tensor_parallel=tp, pipeline_parallel=pp)
    grid = [sys.executable, str(TESTS / "grid.py"), str(folder / "models")]
    done = subprocess.run(grid, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(family, kind.partition("_TP")[0], layout): float(value) for family, kind, layout, value in lines}


@pytest.mark.parametrize("family", EVERYWHERE)
def test_logits_equal_those_of_transformers_at_every_layout_and_format(family, differences):
    found = {key[1:]: value for key, value in differences.items() if key[0] == family}
    kinds = ("hf", "torch_dist") if "moe" in family or family == "mixtral" else ("hf", "torch_dist", "legacy")
    layouts = [f"{tp}x{pp}" for tp in SIZES for pp in SIZES]
    assert found.keys() == {(kind, layout) for kind in kinds for layout in layouts}
    assert {key: value for key, value in found.items() if not value < 1e-4} == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbed_model_survives_the_round_trip_bit_for_bit(family, tmp_path):
    tiny_family(tmp_path / "hf", family, dtype=torch.bfloat16, vocab_size=256)
    tiny_tokenizer(tmp_path / "hf")
    assert lost_in_round_trip(tmp_path / "hf", tmp_path) == []


LAYOUTS = {
    "expert_parallel=2 and expert_tensor_parallel=1, but qwen2 has no experts": ("qwen2", {"expert_parallel": 2}),
    "number of experts=8 is not divisible by expert_parallel=3": ("qwen3_moe", {"expert_parallel": 3}),
    "expert=96 is not divisible by expert_tensor_parallel=5": ("mixtral", {"expert_tensor_parallel": 5}),
    "needs sequence_parallel if tensor_parallel=2": ("qwen3_moe", {"tensor_parallel": 2, "sequence_parallel": False}),
}


@pytest.mark.parametrize("message", LAYOUTS)
def test_a_layout_that_does_not_fit_the_experts_is_refused(message, tmp_path):
    family, layout = LAYOUTS[message]
    tiny_family(tmp_path, family)
    with pytest.raises(ValueError, match=message):
        check_layout(read_config(tmp_path), **{"tensor_parallel": 1, "pipeline_parallel": 1, **layout})


REFUSED = {
    "decoder_sparse_step is 2": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "mlp_only_layers is \\[0\\]": ("qwen2_moe", {"mlp_only_layers": [0]}),
    "norm_topk_prob with num_experts_per_tok=1 is True": ("qwen3_moe", {"num_experts_per_tok": 1}),
    "num_experts_per_tok=1 is True": ("mixtral", {"num_experts_per_tok": 1}),
    "qkv_bias is False": ("qwen2_moe", {"qkv_bias": False}),
    "router_jitter_noise is 0.1": ("mixtral", {"router_jitter_noise": 0.1}),
    "'qwen3_next', which is not supported: megatron-core computes its Gated DeltaNet": (
        "qwen2",
        {"model_type": "qwen3_next"},
    ),
    "model_type is 'mamba'": ("qwen2", {"model_type": "mamba"}),
    "rope_type is 'dynamic'": (
        "qwen2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_model_that_would_be_computed_wrongly_is_refused(message, tmp_path):
    family, changes = REFUSED[message]
    tiny_family(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


OTHER_EXPERTS = {  # settings other than the default, and settings of another family
    "qwen3_moe": [{"norm_topk_prob": False}, {"shared_expert_intermediate_size": 64}],
    "qwen2_moe": [{"norm_topk_prob": True}, {"num_experts_per_tok": 1}],
    "mixtral": [{"norm_topk_prob": False}, {"shared_expert_intermediate_size": 64}],
}


@pytest.mark.parametrize(
    ("family", "setting"), [(family, setting) for family, both in OTHER_EXPERTS.items() for setting in both], ids=str
)
def test_settings_of_experts_mean_what_they_mean_to_transformers(family, setting, tmp_path):
    tiny_family(tmp_path / "hf", family, num_hidden_layers=2, **setting)
    assert setting.items() <= json.loads((tmp_path / "hf" / "config.json").read_text()).items()
    convert(tmp_path / "hf", tmp_path / "megatron")
    assert logit_difference(tmp_path / "hf", tmp_path / "megatron") < 1e-4


SETTINGS = {
    "freeze_router is set, but qwen2 has no experts": ("qwen2", {"freeze_router": True}),
    "router_aux_loss is set, but qwen2 has no experts": ("qwen2", {"router_aux_loss": 0.1}),
    "has no effect with freeze_router": ("qwen3_moe", {"freeze_router": True, "router_aux_loss": 0.1}),
    "together need GPUs": ("qwen3_moe", {"expert_parallel": 2, "expert_tensor_parallel": 2}),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_do_not_fit_the_model_or_the_machine_are_refused(message, tmp_path):
    family, changes = SETTINGS[message]
    if message == "together need GPUs" and torch.cuda.is_available():
        pytest.skip("there is a GPU, with which these settings are accepted")
    tiny_family(tmp_path, family)
    with ranks(), pytest.raises(ValueError, match=message):
        build_state(settings(checkpoint=str(tmp_path), data="d", output="o", **changes), tmp_path)


def test_a_token_is_sent_once_per_rank_or_once_per_expert_whichever_is_less(tmp_path):
    tiny_family(tmp_path, "qwen3_moe")  # 4 experts per token
    model = read_config(tmp_path)
    sent = {n: transformer_config(model, expert_model_parallel_size=n).moe_token_dispatcher_type for n in (2, 4, 8)}
    assert sent == {2: "allgather", 4: "alltoall", 8: "alltoall"}


def test_the_older_format_is_refused_with_experts(tmp_path):
    tiny_family(tmp_path / "hf", "qwen3_moe")
    with pytest.raises(ValueError, match="format 'legacy' has no experts, and model_type is 'qwen3_moe'"):
        convert(tmp_path / "hf", tmp_path / "out", format="legacy")
    assert not list(tmp_path.glob("out*"))


def test_a_sequence_length_beyond_the_sliding_window_is_refused(tmp_path):
    tiny_family(tmp_path, "mistral")
    config = read_config(tmp_path)
    with ranks():
        build_model(config, transformer_config(config), "torch", max_length=64)
        with pytest.raises(ValueError, match="sequence length 65 exceeds the model's sliding_window=64"):
            build_model(config, transformer_config(config), "torch", max_length=65)
