"""The projects of the model menu: the layouts that are chosen for them, and their table in the README."""

import dataclasses
from types import SimpleNamespace

import model_menu
import pytest
from megatron.core.parallel_state import RankGenerator
from support import ROOT, random_store

from rsft_lib import launch
from rsft_lib.chain.parameters import declared_parameters
from rsft_lib.chain.project_file import notebook_file, open_project
from rsft_lib.model.config import check_layout
from rsft_lib.training.advisor import advise, laid_out
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.memory import memory
from rsft_lib.training.rates import H100
from rsft_lib.training.step_time import step_time

DECLARED = declared_parameters(notebook_file("05_train"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return random_store(tmp_path_factory.mktemp("menu") / "store", samples=40, longest=16_000)


def groups(config: TrainConfig, ranks: int, kind: str) -> list[set[int]]:
    """The machines (of 8 ranks) that each group of ranks of a kind, such as `tp-cp`, is on, by megatron-core."""
    sizes = {"tp": config.tensor_parallel, "cp": config.context_parallel, "pp": config.pipeline_parallel}
    made = RankGenerator(ep=1, dp=config.data_parallel(ranks), order="tp-cp-ep-dp-pp", **sizes).get_ranks(kind)
    return [{rank // 8 for rank in group} for group in made]


@pytest.mark.parametrize("project", model_menu.SHAPES)
def test_a_project_of_the_menu_gets_a_layout_that_fits_its_gpus(project, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no rates of this machine
    hf = model_menu.shape(project)
    hf.save_pretrained(tmp_path)
    place = {"checkpoint": str(tmp_path), "data": str(store), "eval_data": "", "output": "o", "seq_length": 16_384}
    values = {name: parameter.default for name, parameter in DECLARED.items()}
    values |= open_project(project).parameters["05_train"] | place
    least = values["nproc"]
    for nproc, nodes in ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2)):
        changed = {"nproc": nproc, "slurm_nodes": nodes, "launcher": "local" if nodes == 1 else "slurm"}
        config, options = launch.split_parameters(SimpleNamespace(**values | changed))
        ranks = options.ranks(nproc)
        if "needs" in model_menu.cell(project, ranks):
            assert ranks < least
            with pytest.raises(ValueError, match="no layout fits"):
                laid_out(config, options.layout, nproc, nodes)
            continue
        found = laid_out(config, options.layout, nproc, nodes)
        check_layout(hf, **found.layout())
        assert found.data_parallel(ranks) and memory(found, hf, ranks).total < 0.95 * H100.memory
        assert all(len(machines) == 1 for machines in groups(found, ranks, "tp-cp"))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 4), (1, 4)])
def test_only_what_crosses_between_machines_depends_on_the_network(tensor, pipeline):
    hf, parallel = model_menu.shape("r1-32b"), {"tensor_parallel": tensor, "sequence_parallel": tensor > 1}
    config = model_menu.run(16_384, 128, pipeline_parallel=pipeline, overlap=False, **parallel)
    slow = dataclasses.replace(H100, network=H100.network / 10)
    usual, slower = (step_time(config, hf, 16, rates) for rates in (H100, slow))
    crosses = [any(len(machines) > 1 for machines in groups(config, 16, kind)) for kind in ("dp", "pp")]
    assert [usual.update < slower.update, usual.exchange < slower.exchange] == crosses
    assert step_time(config, hf, 8, H100) == step_time(config, hf, 8, slow)


def test_the_gradients_cross_between_machines_over_the_adapters_of_a_group():
    # Of 16 ranks on two machines: all are one ring over 8 adapters, or, with TP8, 8 rings of two over one each.
    assert H100.link_across(16, 16) == min(H100.link(16), 8 * 50e9) and H100.link_across(16, 2) == 50e9
    assert H100.link_across(8, 8) == H100.link(8)


def test_groups_of_tensor_parallel_ranks_stay_within_machines_of_four():
    config, four = model_menu.run(16_384, 128), dataclasses.replace(H100, gpus_per_node=4)
    found = advise(config, model_menu.shape("r1-32b"), 16, four)
    assert max(one.config.tensor_parallel * one.config.context_parallel for one in found) == 4


def test_the_readme_has_the_table_of_the_command():
    assert model_menu.menu() in (ROOT / "README.md").read_text(encoding="utf-8"), "benchmarks/model_menu.py --write"
