"""A proof of `checkpoint.verify` as tables."""

import re

from rsft_lib.display.html import Table, one_line


def tensors_table(proof: dict) -> Table:
    """A row for each kind of tensor, over all layers: how many have the same bits on both sides."""
    kinds: dict[tuple, list[dict]] = {}
    for row in proof["tensors"]:
        kind = (re.sub(r"\.\d+\.", ".*.", row["name"]), " × ".join(map(str, row["shape"])), row["dtype"])
        kinds.setdefault(kind, []).append(row)
    rows = []
    for kind, found in kinds.items():
        norms = [row["norm"] for row in found]
        span = f"{min(norms):.4g} to {max(norms):.4g}" if len(found) > 1 else f"{norms[0]:.4g}"
        rows.append((*kind, span, f"{sum(row['same'] for row in found)} of {len(found)}"))
    return Table("tensors", ("tensor", "shape", "dtype", "norm", "same bits"), rows)


def outputs_table(proof: dict) -> Table:
    """The likeliest next tokens of a sentence by both libraries, and what each writes on."""
    rows = [
        (repr(row["token"]), f"{row['transformers']:.5f}", f"{row['megatron']:.5f}") for row in proof["next_tokens"]
    ]
    texts = "; ".join(f"{library} writes {one_line(text)!r}" for library, text in proof["text"].items())
    note = f"largest difference of any logit: {proof['logit_difference']:.1e}; {texts}"
    title = f"what goes on after {proof['sentence']!r}, in fp32"
    return Table(title, ("token", "logit of transformers", "of megatron-core"), rows, note)
