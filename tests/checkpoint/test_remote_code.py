"""Code in a model folder is never run, and the user is not prompted to run it."""

import json
import shutil
from pathlib import Path

import forked
import pytest
from support import random_store, settings

from rsft_lib import demo
from rsft_lib.checkpoint import verify
from rsft_lib.checkpoint.convert import convert
from rsft_lib.checkpoint.export import export
from rsft_lib.generation.generate import generate
from rsft_lib.model.config import read_config
from rsft_lib.tokenizer.contract import check_contract
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer

LEAVES_A_MARK = "from pathlib import Path\nPath({!r}).touch()\nclass Evil: pass\ndef generate(*_, **__): pass\n"
AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model folder with code in every place where transformers would run it after confirmation."""
    folder, asked = tmp_path / "with-code", []
    demo.make_model(folder, seed=0)
    code = LEAVES_A_MARK.format(str(tmp_path / "it-ran"))
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": AUTO_MAP}))
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    yield folder
    assert asked == [] and not (tmp_path / "it-ran").exists()


def of_another_family(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "evil", "architectures": ["Evil"]}))


def test_code_of_a_model_folder_is_never_run_where_the_model_is_known(with_code, tmp_path):
    convert(with_code, tmp_path / "megatron")
    found = verify.verify_conversion(with_code, tmp_path / "megatron", new_tokens=1)
    assert found["differing_tensors"] == found["lost_in_round_trip"] == []
    patch_tokenizer(with_code, tmp_path / "tokenizer", {"<|quad_start|>": "<short>"})
    assert list(check_contract(tmp_path / "tokenizer"))
    export(tmp_path / "megatron", tmp_path / "tokenizer", tmp_path / "out")
    shutil.copytree(with_code, tmp_path / "out", dirs_exist_ok=True)
    assert generate(tmp_path / "out", ["two"], "think", max_new_tokens=1)[0].tokens == 2


def test_code_of_a_model_folder_is_never_run_nor_asked_about_where_the_model_is_not_known(with_code, tmp_path):
    megatron = tmp_path / "megatron"
    convert(with_code, megatron)
    of_another_family(with_code)
    tokenizer, store = load_tokenizer(with_code), random_store(tmp_path / "store")
    run = settings(checkpoint=str(with_code), data=str(store), output=str(tmp_path / "run"))
    not_ours = f"{with_code}/config.json: model_type is 'evil'; this kit only trains models with 'qwen2'"
    not_asked = f"^The repository {with_code} contains custom code"
    for use, error, reason in (
        (lambda: read_config(with_code), ValueError, f"^{not_ours}"),
        (lambda: convert(with_code, tmp_path / "again"), ValueError, f"^{not_ours}"),
        (lambda: verify.verify_conversion(with_code, megatron), ValueError, f"^{not_ours}"),
        (lambda: verify.with_transformers(with_code, lambda logits: logits), ValueError, not_asked),
        (lambda: export(megatron, with_code, tmp_path / "out", original=with_code), ValueError, f"^{not_ours}"),
        (lambda: generate(with_code, ["two"], "think"), ValueError, not_asked),
        (lambda: forked.train(run), RuntimeError, not_ours),
    ):
        with pytest.raises(error, match=reason):
            use()
    assert len(tokenizer) == len(load_tokenizer(with_code))
    check_contract(with_code)
