"""Every family at every layout and in every format, compared with transformers."""

import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, tiny_family
from support import TESTS

from rsft_lib.checkpoint.convert import convert
from rsft_lib.model.config import read_config, transformer_config
from rsft_lib.model.distributed import ranks
from rsft_lib.model.gpt import build_model

SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def differences(tmp_path_factory) -> dict[tuple[str, str, str], float]:
    """(family, format, TP x PP) -> maximum absolute difference of the logits."""
    folder = tmp_path_factory.mktemp("grid")
    for family in FAMILIES:
        here = folder / "models" / family
        model = tiny_family(here / "hf", family)
        ids = torch.randint(250, (1, 48), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save((ids, model(ids).logits), here / "expected.pt")
        convert(here / "hf", here / "torch_dist")
        for tp in SIZES:
            for pp in SIZES:
                convert(here / "hf", here / "legacy", format="legacy", tensor_parallel=tp, pipeline_parallel=pp)
    grid = [sys.executable, str(TESTS / "grid.py"), str(folder / "models")]
    done = subprocess.run(grid, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(family, kind.partition("_TP")[0], layout): float(value) for family, kind, layout, value in lines}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_at_every_layout_and_format(family, differences):
    found = {key[1:]: value for key, value in differences.items() if key[0] == family}
    kinds, layouts = ("hf", "torch_dist", "legacy"), [f"{tp}x{pp}" for tp in SIZES for pp in SIZES]
    assert found.keys() == {(kind, layout) for kind in kinds for layout in layouts}
    assert {key: value for key, value in found.items() if not value < 1e-4} == {}


def test_a_sequence_length_beyond_the_sliding_window_is_refused(tmp_path):
    tiny_family(tmp_path, "mistral")
    config = read_config(tmp_path)
    with ranks():
        build_model(config, transformer_config(config), "torch", max_length=64)
        with pytest.raises(ValueError, match="sequence length 65 exceeds the model's sliding_window=64"):
            build_model(config, transformer_config(config), "torch", max_length=65)
