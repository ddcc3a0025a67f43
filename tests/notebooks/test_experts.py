"""Notebooks 01 to 08 with a mixture of experts, on two expert-parallel ranks."""

from pathlib import Path

from chain import STEPS, chained, outputs
from families import tiny_family
from support import ROOT
from transformers import AutoModelForCausalLM

from rsft_lib import demo
from rsft_lib.common.artifact import MANIFEST
from rsft_lib.notebook import run
from rsft_lib.tokenizer.patch import load_tokenizer
from rsft_lib.training.metrics import read_metrics


def test_a_qwen3_moe_runs_through_all_notebooks_on_two_expert_parallel_ranks(tmp_path):
    demo.make_model(tmp_path / "model", seed=1)
    (tmp_path / "model" / MANIFEST).unlink()  # only its tokenizer stays
    eos = load_tokenizer(tmp_path / "model").eos_token_id
    tiny_family(tmp_path / "model", "qwen3_moe", vocab_size=512, eos_token_id=eos)
    demo.make_sources(tmp_path / "sources", 60, seed=1)
    given = chained(tmp_path)
    given["05_train"] |= {"expert_parallel": 2, "global_batch_size": 4}
    folder = tmp_path / "executed"
    done = {name: run(ROOT / "notebooks" / f"{name}.ipynb", folder, given[name]) for name in given}
    status = {name: result[1] for name, result in done.items()}
    assert {one["status"] for one in status.values()} == {"done"}
    assert status["02_convert_checkpoint"]["differing_tensors"] == []
    records = read_metrics(Path(given["05_train"]["output"]))
    assert len(records) == STEPS and all(len(record["expert_load"]) == 8 for record in records)
    printed = "".join(str(output.get("text", "")) for output in outputs(done["05_train"][0]))
    assert "router_aux_loss 0 (router_aux_loss_coef=0.001 in config.json is not used)" in printed
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.model_type == "qwen3_moe" and exported.config.num_experts == 8
