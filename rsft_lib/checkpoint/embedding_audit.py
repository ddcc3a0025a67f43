"""Audit embedding rows: is the row that a control token inherits typical, and which tokens are its neighbours?"""

import html
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rsft_lib.checkpoint.formats import hf
from rsft_lib.checkpoint.lazy_weights import Weights
from rsft_lib.common.paths import require_path
from rsft_lib.common.visible import visible

INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
ROWS = 8192  # rows per read: 48 MiB in fp32 at hidden size 1,536


@dataclass(frozen=True)
class Row:
    """One token's row of one embedding.

    `percentile` is the percentage of other tokens' rows with a smaller norm, from 0 to 100; `nearest` lists (token,
    cosine similarity) of the most similar rows, best first.
    """

    token: str
    embedding: str
    norm: float
    percentile: float
    nearest: list[tuple[str, float]]


@dataclass(frozen=True)
class Audit:
    """The audited rows, and per embedding the norms of all tokens' rows (float32, [tokens]).

    `without_row` are tokens beyond the last row: `convert` adds their rows, each the mean of all others.
    """

    rows: list[Row]
    norms: dict[str, Tensor]
    without_row: tuple[str, ...] = ()

    def __repr__(self) -> str:
        if not self.norms:
            return "the folder has no weights: no embedding rows to compare"
        lines = [f"{'token':<12} {'embedding':<9} {'norm':>8} {'median':>8} {'percentile':>10}  nearest (cosine)"]
        for row in self.rows:
            median = self.norms[row.embedding].median().item()
            near = ", ".join(f"{token!r} {cosine:.2f}" for token, cosine in row.nearest)
            lines.append(
                f"{row.token:<12} {row.embedding:<9} {row.norm:>8.3f} {median:>8.3f} {row.percentile:>10.1f}  {near}"
            )
        lines += [f"{token:<12} has no row yet: notebook 02 adds one, the mean of all" for token in self.without_row]
        return visible("\n".join(lines))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def audit(model: str | Path, tokenizer, tokens: list[str], nearest: int = 6) -> Audit:
    """Compare the rows of `tokens` with those of all tokens, in the input and output embedding of a model folder.

    Rows are read in blocks from memory-mapped safetensors or `.bin` files. Tied embeddings are reported once. Rows
    beyond the tokenizer's last token are ignored, and tokens beyond the last row are listed in `without_row`. A folder
    with a tokenizer alone has nothing to audit.

    Raises:
        FileNotFoundError: the folder or a shard is missing.
        ValueError: a file is damaged, or a token is not a single id.
    """
    folder = require_path(model, "model folder")
    if not any((folder / name).is_file() for name in hf.SOURCES):
        return Audit([], {})
    weights, numbers = hf.open_tensors(folder, (INPUT, OUTPUT)), {token: _id(tokenizer, token) for token in tokens}
    if INPUT not in weights.pieces:
        raise ValueError(f"{folder} has no tensor {INPUT!r}")
    height = len(weights.empty(INPUT))
    without_row = tuple(token for token, number in numbers.items() if number >= height)
    tokens = [token for token in tokens if token not in without_row]
    rows, norms, ids = [], {}, [numbers[token] for token in tokens]
    for name, title in ((INPUT, "input"), (OUTPUT, "output")):
        if name not in weights.pieces:
            continue
        lengths, products = _scan(weights, name, ids, len(tokenizer))
        title = "tied" if OUTPUT not in weights.pieces else title
        norms[title] = lengths
        for number, token, product in zip(ids, tokens, products, strict=True):
            rows.append(_row(tokenizer, token, number, title, lengths, product, nearest))
    return Audit(rows, norms, without_row)


def row_means(tokenizer, words: dict[str, list[str]]) -> dict[int, list[int]]:
    """The argument of `convert(row_means=...)`: token id -> ids whose mean initialises its embedding.

    Args:
        words: control token -> words with its intended meaning, such as {'<short>': ['short', 'brief', 'answer']}. A
            word is tokenized with a space before it; a word of several tokens contributes all of them.

    Raises:
        ValueError: a control token is not a single id, or has no words.
    """
    means = {}
    for token, chosen in words.items():
        ids = [i for word in chosen for i in tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]]
        number = _id(tokenizer, token)
        if not ids or number in ids:
            raise ValueError(f"{token!r} must be initialised from words other than itself, found {chosen}")
        means[number] = ids
    return means


def _id(tokenizer, token: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"{token!r} has {len(ids)} token ids ({ids}), expected one; patch the tokenizer (notebook 01)")
    return ids[0]


def _scan(weights: Weights, name: str, ids: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Norms of the first `count` rows, [count], and their dot products with the rows `ids`, [len(ids), count]."""
    selected = torch.cat([_rows(weights, name, i, i + 1) for i in ids] or [_rows(weights, name, 0, 0)])  # [len(ids), h]
    count = min(count, len(weights.empty(name)))
    pieces = (_rows(weights, name, start, min(start + ROWS, count)) for start in range(0, count, ROWS))
    results = [(piece.norm(dim=1), selected @ piece.T) for piece in pieces]
    return torch.cat([norm for norm, _ in results]), torch.cat([product for _, product in results], dim=1)


def _rows(weights: Weights, name: str, start: int, stop: int) -> Tensor:
    return weights.read(name, (slice(start, stop), slice(None))).float()  # [rows, h]; bf16 norms have 3 digits


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
    return tokenizer.convert_ids_to_tokens(number) if "\ufffd" in text else text  # an incomplete character
