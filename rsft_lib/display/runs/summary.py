"""A run on one screen."""

from pathlib import Path

from rsft_lib.training.metrics import read_metrics


def summary(run: Path, scores: dict[str, dict[str, float]], model: Path) -> str:
    """Loss, speed and time of a run folder, scores by mode (of `generate.score`), and where the model is."""
    records = read_metrics(run)
    seconds = sum(record["seconds"] for record in records)
    speed = sum(record["seconds"] * record["tokens_per_second"] for record in records) / seconds
    lines = [
        f"loss             {records[0]['loss']:.3f} at first, {records[-1]['loss']:.3f} at last",
        f"training         {len(records)} steps, {seconds:,.0f} seconds, {speed:,.0f} tokens/s",
        *_choice(records[-1]),
        "mode             accuracy   well formed   tokens",
    ]
    for mode, s in scores.items():
        lines.append(
            f"  <{mode}>".ljust(17) + f"{s['accuracy']:>8.1%}   {s['well_formed']:>11.1%}   {s['tokens']:>6.1f}"
        )
    return "\n".join([*lines, f"exported model   {model}"])


def _choice(record: dict) -> list[str]:
    """How sure the model is of the mode that the data has, where both occur."""
    names = ("p_think_when_think", "p_think_when_short")
    if not all(name in record for name in names):
        return []
    think, short = (record[name] for name in names)
    return [f"P(<think>)       {think:.1%} where the data thinks, {short:.1%} where it answers at once, at last"]
