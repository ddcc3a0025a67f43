"""An audit of embedding rows: is the row that a control token inherits like the others, and near which words?"""

import html
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsft_lib.checkpoint.formats import hf
from rsft_lib.checkpoint.lazy_weights import Weights
from rsft_lib.common.paths import existing
from rsft_lib.common.visible import visible

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # read at once: 48 MiB as fp32 at a width of 1,536


@dataclass(frozen=True)
class Row:
    """One token's row of one embedding.

    `percentile` is the share of other tokens' rows with a smaller norm, from 0 to 100; `nearest` are (token, cosine
    similarity) of the rows that point most alike, best first.
    """

    token: str
    embedding: str
    norm: float
    percentile: float
    nearest: list[tuple[str, float]]


@dataclass(frozen=True)
class Audit:
    """Rows that were asked for, and by embedding the norms of all tokens' rows (float32, [tokens])."""

    rows: list[Row]
    norms: dict[str, Tensor]

    def __repr__(self) -> str:
        lines = [f"{'token':<12} {'embedding':<9} {'norm':>8} {'median':>8} {'percentile':>10}  nearest (cosine)"]
        for row in self.rows:
            median = self.norms[row.embedding].median().item()
            near = ", ".join(f"{token!r} {cosine:.2f}" for token, cosine in row.nearest)
            lines.append(
                f"{row.token:<12} {row.embedding:<9} {row.norm:>8.3f} {median:>8.3f} {row.percentile:>10.1f}  {near}"
            )
        return visible("\n".join(lines))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def audit(model: str | Path, tokenizer, tokens: list[str], nearest: int = 6) -> Audit:
    """Compare the rows of `tokens` with those of all tokens, in the input and the output embedding of a model folder.

    Rows are read in pieces from memory-mapped safetensors or `.bin` files, so memory stays at one piece.
    Tied embeddings are one. Rows beyond the tokenizer's last token are no token's, and left out.

    Raises:
        FileNotFoundError: there is no model, or a shard of it is missing.
        ValueError: a file is damaged, a token is not one id, or the embedding has no row for it.
    """
    folder = existing(model, "model folder")
    weights, ids = hf.open_tensors(folder, (INPUT, OUTPUT)), [_id(tokenizer, token) for token in tokens]
    if INPUT not in weights.pieces:
        raise ValueError(f"{folder} has no tensor {INPUT!r}")
    rows, norms = [], {}
    for name, title in ((INPUT, "input"), (OUTPUT, "output")):
        if name not in weights.pieces:
            continue
        lengths, products = _scan(weights, name, ids, len(tokenizer))
        title = "tied" if OUTPUT not in weights.pieces else title
        norms[title] = lengths
        for number, token, product in zip(ids, tokens, products, strict=True):
            rows.append(_row(tokenizer, token, number, title, lengths, product, nearest))
    return Audit(rows, norms)


def row_means(tokenizer, words: dict[str, list[str]]) -> dict[int, list[int]]:
    """Which rows to average for the first value of which row: token id -> ids, as `convert(row_means=...)` takes them.

    Args:
        words: control token -> words that mean what it should, such as {'<short>': ['short', 'brief', 'answer']}. A
            word is taken as it stands inside a sentence, with a space before it; one of several tokens gives all.

    Raises:
        ValueError: a control token is not one id, or it has no words.
    """
    means = {}
    for token, chosen in words.items():
        ids = [i for word in chosen for i in tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]]
        number = _id(tokenizer, token)
        if not ids or number in ids:
            raise ValueError(f"{token!r} needs words other than itself to begin from, found {chosen}")
        means[number] = ids
    return means


def _id(tokenizer, token: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{token!r} is {len(ids)} tokens ({ids}), expected one; patch the tokenizer (notebook 01)")
    return ids[0]


def _scan(weights: Weights, name: str, ids: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Norms of the first `count` rows, [count], and their dot products with the rows `ids`, [len(ids), count]."""
    height = len(weights.empty(name))
    if max(ids) >= height:
        raise ValueError(f"{name} has {height} rows, none for token {max(ids)}")
    wanted = torch.cat([_rows(weights, name, i, i + 1) for i in ids])  # [len(ids), h]
    count = min(count, height)
    pieces = (_rows(weights, name, start, min(start + ROWS, count)) for start in range(0, count, ROWS))
    found = [(piece.norm(dim=1), wanted @ piece.T) for piece in pieces]
    return torch.cat([norm for norm, _ in found]), torch.cat([product for _, product in found], dim=1)


def _rows(weights: Weights, name: str, start: int, stop: int) -> Tensor:
    return weights.read(name, (slice(start, stop), slice(None))).float()  # [rows, h]; bf16 norms would be three digits


def _row(tokenizer, token: str, number: int, title: str, norms: Tensor, product: Tensor, nearest: int) -> Row:
    others = torch.arange(len(norms)) != number
    cosine = product / (norms * norms[number]).clamp_min(1e-12)
    cosine[number] = -torch.inf
    best = cosine.topk(min(nearest, len(norms) - 1))
    near = [(_shown(tokenizer, i), c) for i, c in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    below = (norms[others] < norms[number]).float().mean().item()
    return Row(token, title, norms[number].item(), 100 * below, near)


def _shown(tokenizer, number: int) -> str:
    text = tokenizer.decode([number])
    return tokenizer.convert_ids_to_tokens(number) if "\ufffd" in text else text  # part of a character
