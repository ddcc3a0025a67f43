"""`verify.json` beside an exported model: all that was measured and proved about it, by which command and from what.

`command`, `made_with` (versions, commit), `sha256` of inputs and files, `losses` of the run and `scores` by mode, and
the report of `checkpoint.verify` with its `proofs` and their tolerances. The model card shows the same.
"""

import json
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

from rsft_lib.checkpoint.model_card import markdown_table, with_verification
from rsft_lib.common.artifact import README, VERIFICATION, own_manifest, read_manifest, write_json
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.common.provenance import made_with
from rsft_lib.common.temporary import new_file
from rsft_lib.training.metrics import scan_metrics

LOSS = re.compile("(eval_)?loss(?:_mode_(think|short|other))?")


def write_card(model: str | Path, run: str | Path, report: dict, scores: dict[str, dict], command: str) -> dict:
    """Write `verify.json` into the folder of an exported model, and the same into its model card.

    Args:
        run: folder of the training.
        report: of `checkpoint.verify`; empty if nothing was verified.
        scores: by mode, from `generate.score`.
        command: what made all of this.

    Returns:
        The content of `verify.json`.
    """
    folder = resolve(model)
    card = {
        "command": command, "finished": datetime.now(UTC).isoformat(timespec="seconds"), "made_with": made_with(),
        "sha256": _hashes(folder), "losses": losses(run), "scores": scores, "proofs": [],
    } | report  # fmt: skip
    write_json(folder / VERIFICATION, card)
    text = with_verification((folder / README).read_text(encoding="utf-8"), as_markdown(card))
    with new_file(folder / README) as file:
        file.write(text)
    return card


def scores_of(models: str) -> dict[str, dict[str, dict]]:
    """Scores by mode from the cards of exported models, by name and checkpoint; `models` are comma-separated folders.

    Raises:
        FileNotFoundError: a model has no card.
    """
    found = {}
    for model in filter(None, map(str.strip, models.split(","))):
        path = require_path(Path(model) / VERIFICATION, "verification card, from notebook 07")
        checkpoint = Path(own_manifest(path.parent).get("checkpoint", ""))
        found[f"{path.parent.name} {checkpoint.name}".strip()] = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return found


def budget_name(budget: int) -> str:
    """The name in a card for the scores of answers with a thinking budget, in tokens."""
    return f"think within {budget} tokens"


def budgets_of(scores: dict[str, dict]) -> dict[int, dict]:
    """The scores with a thinking budget of a card, by the budget in tokens."""
    found = {name: re.fullmatch(budget_name(0).replace("0", r"(\d+)"), name) for name in scores}
    return {int(match[1]): scores[name] for name, match in found.items() if match}


def command_of(notebook: str, parameters: dict) -> str:
    """The command that runs a notebook with these parameters."""
    given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    return shlex.join(["python", "-m", "rsft_lib.notebook", f"notebooks/{notebook}.ipynb", "outputs/executed", *given])


def losses(run: str | Path) -> dict:
    """The last values of a run's losses, in nats per trained token, by mode: `training` and `held_out`."""
    found: dict = {"training": {}, "held_out": {}}
    for record in scan_metrics(resolve(run)).records:
        found["iteration"] = record["iteration"]
        for name, value in record.items():
            if value is not None and (match := LOSS.fullmatch(name)):
                found["held_out" if match[1] else "training"][match[2] or "all"] = value
    return found


def as_markdown(card: dict) -> str:
    """The card for people: proofs, losses and scores as tables, then versions, hashes and the command."""
    proofs = [
        ("ok" if proof["passed"] else "FAILED", proof["name"], proof["found"], proof["tolerance"])
        for proof in card["proofs"]
    ]
    held_out, training = card["losses"]["held_out"], card["losses"]["training"]
    loss_rows = [(f"`{name}`", _number(training.get(name)), _number(held_out.get(name))) for name in training]
    names = list(dict.fromkeys(name for score in card["scores"].values() for name in score))
    score_rows = [(mode, *(_number(score.get(name)) for name in names)) for mode, score in card["scores"].items()]
    versions = [(name, value) for name, value in card["made_with"].items() if name != "host"]
    parts = [
        markdown_table(("", "proof", "found", "tolerance"), proofs) if proofs else "No proofs were made.",
        markdown_table(("loss, nats per token", "training", "held-out"), loss_rows),
        markdown_table(("answers", *(name.replace("_", " ") for name in names)), score_rows),
        markdown_table(("made with", ""), versions),
        markdown_table(("SHA-256", ""), [(name, f"`{value}`") for name, value in card["sha256"].items()]),
        f"```\n{card['command']}\n```",
        f"All of it is in `{VERIFICATION}`.",
    ]
    return "\n\n".join(parts)


def _hashes(model: Path) -> dict[str, str]:
    """SHA-256 of what the model was made from, and of each of its files."""
    manifest = read_manifest(model)
    trained = own_manifest(Path(manifest["checkpoint"]))  # empty if it was removed since
    inputs = {"checkpoint (manifest)": manifest["checkpoint_sha256"], "base (manifest)": trained.get("base_sha256", "")}
    inputs["data (manifest)"] = trained.get("data", {}).get("manifest_sha256", "")
    files = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return {name: value for name, value in (inputs | files).items() if value}


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
