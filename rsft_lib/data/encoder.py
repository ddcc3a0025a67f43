"""Encode texts with trained spans to token ids and loss masks, with Hugging Face's tokenizer or a verified faster one.

gigatoken (https://github.com/marcelroed/gigatoken) is about twenty times faster but returns no offsets. In a byte-level
vocabulary every token is a byte string, so a token's offset is the number of bytes of the tokens before it, provided
that the bytes of all tokens add up to those of the text and normalization does not change the text. Other texts are
encoded with Hugging Face's tokenizer.
"""

import json
import random
import unicodedata
from functools import cached_property
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rsft_lib.tokenizer.chat import Span, mask_of

try:
    import gigatoken
except ImportError:
    gigatoken = None


class Tokens(NamedTuple):
    """An encoded text: ids int32 [tokens], and the loss mask uint8 [tokens] as indices into LOSS_WEIGHTS."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


class ReferenceEncoder:
    """Hugging Face's tokenizer, which returns the character offsets of tokens."""

    name = f"tokenizers {version('tokenizers')}"

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: list[str], spans: list[list[Span]]) -> list[Tokens | ValueError]:
        """Ids and mask of each text, or a ValueError where a token crosses the boundary of a span."""
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._tokens(*each) for each in zip(encodings, spans, texts, strict=True)]

    def _tokens(self, encoding, spans: list[Span], text: str) -> Tokens | ValueError:
        try:
            mask = mask_of(encoding.offsets, spans, text)
        except ValueError as error:
            return error
        return Tokens(np.array(encoding.ids, dtype=np.int32), np.array(mask, dtype=np.uint8))


class FastEncoder:
    """gigatoken, with the mask computed from byte lengths; gives the same results as ReferenceEncoder."""

    name = f"gigatoken {version('gigatoken')}" if gigatoken else ""

    def __init__(self, tokenizer_json: str):
        self.tokenizer_json = tokenizer_json
        self.tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)
        vocab = self.tokenizer.vocab
        self.bytes_of = np.zeros(max(vocab) + 1, dtype=np.int64)  # [vocabulary]
        self.bytes_of[list(vocab)] = [len(token) for token in vocab.values()]
        self.normalizes = bool(json.loads(tokenizer_json).get("normalizer"))

    @cached_property
    def reference(self) -> ReferenceEncoder:
        return ReferenceEncoder(self.tokenizer_json)

    def encode(self, texts: list[str], spans: list[list[Span]]) -> list[Tokens | ValueError]:
        """As ReferenceEncoder.encode; the texts are concatenated, so that numpy processes all at once."""
        if not texts:
            return []
        rows = [self.tokenizer.encode(text) for text in texts]
        stops = np.cumsum([len(row) for row in rows])
        ids = np.concatenate(rows).astype(np.int32)  # [tokens of all texts]
        ends = np.concatenate([[0], self.bytes_of[ids].cumsum()])  # [tokens + 1] byte at which each token ends
        mask = np.zeros(len(ids), dtype=np.uint8)
        result: list[Tokens | ValueError] = []
        for text, own, start, stop in zip(texts, spans, stops - [len(row) for row in rows], stops, strict=True):
            if self._mark(mask, ends[start : stop + 1], start, text, own):
                result.append(Tokens(ids[start:stop], mask[start:stop]))
            else:  # returns the correct mask or raises the error
                result += self.reference.encode([text], [own])
        return result

    def _mark(self, mask: NDArray[np.uint8], ends: NDArray[np.int64], start: int, text: str, spans: list[Span]) -> bool:
        """Fill in the mask of one text, whose tokens begin at `start`; False if byte lengths do not determine it."""
        ascii_only = text.isascii()
        if ends[-1] - ends[0] != (len(text) if ascii_only else len(text.encode())):
            return False
        if self.normalizes and not ascii_only and not unicodedata.is_normalized("NFC", text):
            return False
        for span in spans:
            edges = span[:2] if ascii_only else [len(text[:edge].encode()) for edge in span[:2]]
            first, last = ends.searchsorted(edges + ends[0])
            if ends[first] - ends[0] != edges[0] or ends[last] - ends[0] != edges[1]:
                return False
            mask[start + first : start + last] = span.code
        return True


Encoder = FastEncoder | ReferenceEncoder


def best_encoder(tokenizer_json: str, texts: list[str]) -> tuple[Encoder, dict]:
    """The fastest encoder that returns Hugging Face's ids, and the result of the comparison.

    Args:
        texts: a sample of the texts to be encoded, since tokenizers can agree on other texts and differ on these.

    Returns:
        The encoder, and facts for the manifest: its name, the numbers of texts compared and, if the fast encoder is not
        used, the reason as `why_slow`.
    """
    reference = ReferenceEncoder(tokenizer_json)
    hard = hard_texts(sorted(t.content for t in reference.tokenizer.get_added_tokens_decoder().values()))
    facts = {"encoder": reference.name, "texts_compared": len(texts), "hard_texts_compared": len(hard)}
    try:
        if gigatoken is None:
            raise ImportError("gigatoken is not installed; pip install 'gigatoken<0.11' tokenizes 20 times faster")
        fast = FastEncoder(tokenizer_json)
        _compare(fast, reference, [*hard, *texts])
    except Exception as error:  # any error: use the reference
        return reference, facts | {"why_slow": str(error)}
    return fast, facts | {"encoder": fast.name}


def _compare(fast: FastEncoder, reference: ReferenceEncoder, texts: list[str]) -> None:
    spans = [[Span(0, len(text))] if text else [] for text in texts]
    for text, found, expected in zip(texts, *(each.encode(texts, spans) for each in (fast, reference)), strict=True):
        if not (np.array_equal(found.ids, expected.ids) and np.array_equal(found.loss_mask, expected.loss_mask)):
            raise ValueError(f"{fast.name} and {reference.name} encode {text[:60]!r} differently")


def hard_texts(control_tokens: list[str]) -> list[str]:
    """Texts on which tokenizers differ: scripts, emoji, combining marks, spaces, long runs, embedded control tokens."""
    pieces = [
        "a", "The", " the", "don't I'LL", "x1234567890", "3.14e-5", "\n", "\n\n", " \n ", "\t", "  ", "   x", "\r\n",
        "解", "数学很好", "日本語テキスト", "한국어", "Ελληνικά", "привет", "שלום", "مرحبا", "हिन्दी", "ไทย",
        "é", "e\u0301", "Å", "A\u030a", "ﬁ", "\u212b", "o\u0323\u0302", "\u1100\u1161", "\u0958",
        "🙂", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "\u200b", "\u200d", "\u00a0", "\u2028", "\ufeff", "\x00", "\x7f", "\u0085",
        "<", "<|", "<think", "</", "｜>", "\\frac{1}{2}", "{{", "}}", "{% raw %}", "`code`", "==>", "...", "!!", "'s",
    ]  # fmt: skip
    pieces += control_tokens + [token[:-1] for token in control_tokens] + [f"{token} " for token in control_tokens]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(200)]
    return ["", *pieces, *mixed, "a" * 2000, " " * 500, "\n" * 100, "é" * 300, "解" * 300, "1" * 300]


def encoder(name: str, tokenizer_json: str) -> Encoder:
    """The encoder that `best_encoder` chose, by the name in its facts."""
    return (FastEncoder if name == FastEncoder.name else ReferenceEncoder)(tokenizer_json)
