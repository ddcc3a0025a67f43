"""Tables of a checkpoint: the facts in its manifest, and the report of `checkpoint.verify` with its proofs."""

import re

from rsft_lib.checkpoint.proofs import Proof
from rsft_lib.display.html import Table, one_line


def facts_table(title: str, facts: dict) -> Table:
    """Names and values of a manifest, without empty values and hashes."""
    shown = {name: value for name, value in facts.items() if value not in ("", None, {}, []) and "sha256" not in name}
    return Table(title, ("", ""), [(name.replace("_", " "), _text(value)) for name, value in shown.items()])


def proofs_table(report: dict) -> Table:
    """What was proved, what was found and the tolerance; empty if nothing was verified."""
    found = [Proof(**proof) for proof in report.get("proofs", [])]
    rows = [("ok" if proof.passed else "FAIL", *proof[:1], *proof[2:]) for proof in found]
    title = "proofs" if rows else "nothing was verified: verify is False"
    return Table(title, ("", "proof", "found", "tolerance"), rows)


def tensors_table(report: dict) -> Table:
    """One row per kind of tensor, over all layers: how many are bit-identical in both checkpoints."""
    kinds: dict[tuple, list[dict]] = {}
    for row in report["tensors"]:
        kind = (re.sub(r"\.\d+\.", ".*.", row["name"]), " × ".join(map(str, row["shape"])), row["dtype"])
        kinds.setdefault(kind, []).append(row)
    rows = []
    for kind, tensors in kinds.items():
        norms = [row["norm"] for row in tensors]
        span = f"{min(norms):.4g} to {max(norms):.4g}" if len(tensors) > 1 else f"{norms[0]:.4g}"
        rows.append((*kind, span, f"{sum(row['same'] for row in tensors)} of {len(tensors)}"))
    return Table("tensors", ("tensor", "shape", "dtype", "norm", "bit-identical"), rows)


def outputs_table(report: dict) -> Table:
    """The most likely next tokens after a prompt under both libraries, and the continuation by each."""
    rows = [
        (repr(row["token"]), f"{row['transformers']:.5f}", f"{row['megatron']:.5f}") for row in report["next_tokens"]
    ]
    texts = "; ".join(f"continuation by {library}: {one_line(text)!r}" for library, text in report["text"].items())
    note = f"maximum absolute logit difference: {report['logit_difference']:.1e}; {texts}"
    title = f"next token after {report['sentence']!r}, in fp32"
    return Table(title, ("token", "transformers logit", "megatron-core logit"), rows, note)


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return f"{value:,}" if type(value) is int else str(value)
