"""Check that a run may resume from a checkpoint: same model, data and settings, independent of their paths."""

from pathlib import Path

from rsft_lib.checkpoint.any_format import identity
from rsft_lib.common.artifact import MANIFEST, read_manifest
from rsft_lib.training.config import SHAPES_THE_RUN, TrainConfig
from rsft_lib.training.datasets import Datasets


def facts_of(config: TrainConfig, data: Datasets, base: Path) -> dict:
    """The facts of a run in a checkpoint's manifest: settings, and hashes of data and base model."""
    return {"config": config.to_json(), "data": data.facts(), "base_sha256": identity(base)}


def refuse_another_run(checkpoint: Path, facts: dict) -> list[str]:
    """Refuse to resume with another model, other data or other settings of `SHAPES_THE_RUN`; `train_iters` may grow.

    Args:
        facts: as `facts_of` returns them.

    Returns:
        For the log, a line for each changed setting that is allowed to change.

    Raises:
        ValueError: lists every difference that is not allowed; or the manifest has no facts of its run.
    """
    recorded = read_manifest(checkpoint)
    _refuse_damaged(checkpoint, recorded)
    old, new = TrainConfig.with_defaults(recorded["config"]), facts["config"]
    changed = {name: f"was {old[name]!r}, now {new[name]!r}" for name in new if name in old and old[name] != new[name]}
    differences = [f"{name}: {changed.pop(name)}" for name in SHAPES_THE_RUN if name in changed]
    if new["train_iters"] < old["train_iters"]:
        differences.append(f"train_iters: {changed.pop('train_iters')}; it may only grow")
    base = recorded.get("base_sha256", "")
    if base != facts["base_sha256"] and (base or "checkpoint" in changed):
        paths = changed.pop("checkpoint", f"{new['checkpoint']!r} has changed")
        differences.append(
            f"checkpoint: {paths}; SHA-256 of the weights was {base[:12]}, now {facts['base_sha256'][:12]}"
        )
    differences += [
        f"data: {name}: was {recorded['data'].get(name)!r}, now {value!r}"
        for name, value in facts["data"].items()
        if recorded["data"].get(name) != value
    ]
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"{checkpoint} belongs to another run:\n  {listed}\n"
            "Restore these to resume it, or choose another output folder for a new run."
        )
    if "train_iters" in changed:
        changed["train_iters"] += "; the learning-rate schedule is recomputed for the new length"
    return [f"{name}: {values}" for name, values in changed.items()]


def _refuse_damaged(checkpoint: Path, manifest: dict) -> None:
    config, data = manifest.get("config"), manifest.get("data")
    valid = isinstance(config, dict) and type(config.get("train_iters")) is int and isinstance(data, dict)
    if not valid or not isinstance(manifest.get("base_sha256", ""), str):
        raise ValueError(
            f"{checkpoint / MANIFEST} is damaged: the settings or data of the run are missing. Move this checkpoint "
            "away to resume from the previous one, or choose another output folder for a new run."
        )
