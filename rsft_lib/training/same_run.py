"""Whether a run may go on from a checkpoint: with what it began with, wherever that lies by now."""

from pathlib import Path

from rsft_lib.artifact import read_manifest
from rsft_lib.checkpoint.sources import identity
from rsft_lib.training.config import SHAPES_THE_RUN, TrainConfig
from rsft_lib.training.datasets import Datasets


def facts_of(config: TrainConfig, data: Datasets, base: Path) -> dict:
    """What the manifests of a run's checkpoints tell of it: its settings, and the hashes of data and base model."""
    return {"config": config.to_json(), "data": data.facts(), "base_sha256": identity(base)}


def refuse_another_run(checkpoint: Path, facts: dict) -> list[str]:
    """A run may be continued only with the model, the settings and the data it began with; its length may grow.

    Args:
        facts: as `facts_of` gives them.

    Returns:
        For the log, a line for each setting that has changed without making it another run.

    Raises:
        ValueError: with every difference that does.
    """
    before = read_manifest(checkpoint)
    old, new = before["config"], facts["config"]
    changed = {name: f"was {old[name]!r}, now {new[name]!r}" for name in new if name in old and old[name] != new[name]}
    differences = [f"{name}: {changed.pop(name)}" for name in SHAPES_THE_RUN if name in changed]
    if new["train_iters"] < old["train_iters"]:
        differences.append(f"train_iters: {changed.pop('train_iters')}; it may grow only")
    base = before.get("base_sha256", "")
    if base != facts["base_sha256"] and (base or "checkpoint" in changed):
        told = changed.pop("checkpoint", f"{new['checkpoint']!r} has changed")
        differences.append(
            f"checkpoint: {told}; SHA-256 of the weights was {base[:12]}, now {facts['base_sha256'][:12]}"
        )
    differences += [
        f"data: {name}: was {before['data'].get(name)!r}, now {value!r}"
        for name, value in facts["data"].items()
        if before["data"].get(name) != value
    ]
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} belongs to another run:\n  {listed}\n"
            "Set these back to continue it, or choose another output folder for a new run."
        )
    if "train_iters" in changed:
        changed["train_iters"] += "; from here on the learning rate is that of a run of this length"
    return [f"{name}: {told}" for name, told in changed.items()]
