"""The record of what was proved and measured about an exported model."""

import json
import shlex

import pytest

from rsft_lib.checkpoint.model_card import model_card
from rsft_lib.common.artifact import MANIFEST, file_hash, new_folder, verify
from rsft_lib.evaluation.verification_card import as_markdown, command_of, losses, scores_of, write_card
from rsft_lib.notebook import checked, declared_parameters, project_root

RECORDS = [
    {"iteration": 1, "loss": 5.0, "loss_mode_think": 4.0, "loss_span_eos": 3.0},
    {"iteration": 1, "loss": 5.0, "eval_loss": 6.0, "eval_loss_mode_short": 7.0},
    {"iteration": 2, "loss": 1.5, "loss_mode_think": 1.25, "loss_mode_short": None},
]  # fmt: skip
REPORT = {
    "proofs": [{"name": "same | logits", "passed": True, "found": "2e-06", "tolerance": "1e-03"}],
    "logit_difference": 2e-6,
}  # fmt: skip
SCORES = {"think": {"accuracy": 0.5, "well_formed": 1.0, "tokens": 36.25, "cut_off": 3}, "short": {"well_formed": 0.25}}


@pytest.fixture
def exported(tmp_path):
    """(model folder, run folder); the model was made from a checkpoint of the run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    trained = {"made_by": "train", "base_sha256": "b" * 64, "data": {"manifest_sha256": "d" * 64}}
    with new_folder(run / "iter_0000002", trained):
        pass
    facts = {"made_by": "export", "checkpoint": str(run / "iter_0000002"), "checkpoint_sha256": "c" * 64}
    with new_folder(tmp_path / "model", facts) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "README.md").write_text(model_card("model", run / "iter_0000002", {}), encoding="utf-8")
    return tmp_path / "model", run


def test_the_card_has_everything_that_was_proved_and_measured_and_from_what(exported):
    model, run = exported
    card = write_card(model, run, REPORT, SCORES, "the command")
    assert card == json.loads((model / "verify.json").read_text())
    assert card["proofs"] == REPORT["proofs"] and card["logit_difference"] == 2e-6 and card["scores"] == SCORES
    assert card["losses"] == losses(run) == {
        "training": {"all": 1.5, "think": 1.25}, "held_out": {"all": 6.0, "short": 7.0}, "iteration": 2,
    }  # fmt: skip
    assert card["command"] == "the command" and {"torch", "megatron-core", "git commit"} <= card["made_with"].keys()
    assert card["sha256"] == {
        "checkpoint (manifest)": "c" * 64, "base (manifest)": "b" * 64, "data (manifest)": "d" * 64,
        "model.safetensors": file_hash(model / "model.safetensors"),
    }  # fmt: skip


def test_scores_of_several_models_are_read_by_name_and_checkpoint(exported):
    model, run = exported
    with pytest.raises(FileNotFoundError, match="verification card"):
        scores_of(str(model))
    write_card(model, run, REPORT, SCORES, "the command")
    assert scores_of(f"{model}, ") == {"model iter_0000002": SCORES} and scores_of("") == {}


def test_the_model_card_shows_it_and_the_model_stays_intact(exported):
    model, run = exported
    manifest = (model / MANIFEST).read_bytes()
    for scores in ({}, SCORES):  # made again, it is replaced
        card = write_card(model, run, REPORT, scores, "the command")
    text = (model / "README.md").read_text(encoding="utf-8")
    assert text.count(as_markdown(card)) == text.count("the command") == 1 and "Not verified" not in text
    assert r"| ok | same \| logits | 2e-06 | 1e-03 |" in text and "| think | 0.5 | 1 | 36.25 | 3 |" in text
    assert "| short | – | 0.25 | – | – |" in text and card["made_with"]["host"] not in text
    assert (model / MANIFEST).read_bytes() == manifest and verify(model)
    assert "No proofs" in as_markdown(write_card(model, run, {}, SCORES, "the command"))


def test_a_model_card_that_somebody_rewrote_is_left_alone(exported):
    model, run = exported
    (model / "README.md").write_text("# Mine\n", encoding="utf-8")
    write_card(model, run, REPORT, SCORES, "the command")
    assert (model / "README.md").read_text(encoding="utf-8") == "# Mine\n" and verify(model)


def test_the_command_gives_the_notebook_every_parameter_as_it_was():
    declared = declared_parameters(project_root() / "notebooks" / "07_export_and_generate.ipynb")
    values = {name: parameter.default for name, parameter in declared.items()} | {"held_out": "a folder/$x.jsonl"}
    words = shlex.split(command_of("07_export_and_generate", values))
    assert words[:4] == ["python", "-m", "rsft_lib.notebook", "notebooks/07_export_and_generate.ipynb"]
    given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
    assert checked(given, declared) == values
