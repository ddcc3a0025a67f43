"""What a verification proves: each proof with its result, what was found, and the tolerance by which it passes."""

from collections.abc import Sequence
from typing import NamedTuple

LOGIT_TOLERANCE = 1e-3  # in fp32, with the same weights: the order of additions differs between libraries


class Proof(NamedTuple):
    """One proof; `tolerance` is what may differ."""

    name: str
    passed: bool
    found: str
    tolerance: str


def proofs(report: dict) -> list[Proof]:
    """The proofs in the report of `checkpoint.verify`."""
    same = len(report["tensors"]) - len(report["differing_tensors"])
    dtype = f", as {report['rounded']}" if report["rounded"] else ""
    found = [
        Proof(
            "every tensor is bit-identical in both", not report["differing_tensors"],
            _listed(f"{same} of {len(report['tensors'])} tensors{dtype}", report["differing_tensors"]), "none",
        ),
        Proof(
            f"transformers and megatron-core compute the same logits{dtype}",
            report["logit_difference"] <= LOGIT_TOLERANCE,
            f"they differ by at most {report['logit_difference']:.1e}", f"{LOGIT_TOLERANCE:.0e}, in fp32",
        ),
    ]  # fmt: skip
    if "lost_in_round_trip" in report:
        lost = report["lost_in_round_trip"]
        result = _listed(f"{len(lost)} tensors lost", lost)
        found.insert(
            1, Proof("with its last bits flipped, every tensor survives a round trip", not lost, result, "none")
        )
    return found


def require_proofs(report: dict) -> None:
    """Raise a ValueError that lists the proofs of a report that failed."""
    failed = [proof for proof in report.get("proofs", []) if not proof["passed"]]
    lines = (f"  {proof['name']}: {proof['found']}; tolerance {proof['tolerance']}" for proof in failed)
    if failed:
        raise ValueError("\n".join([f"{report['model']} and {report['checkpoint']} differ:", *lines]))


def _listed(text: str, names: Sequence[str]) -> str:
    """`text` and the first of the names."""
    return text + f": {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" * bool(names)
