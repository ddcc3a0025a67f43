"""Texts with trained spans to token ids and loss mask: Hugging Face's tokenizer, or one that is proved equal to it.

gigatoken (https://github.com/marcelroed/gigatoken) encodes some twenty times faster, but tells no offsets. In a
byte-level vocabulary every token is a string of bytes, so the bytes of the tokens before it say where a token begins;
that holds where the bytes of all tokens add up to the text's and the text is not changed by normalization. A text for
which it does not hold goes to Hugging Face's tokenizer.
"""

import json
import random
import unicodedata
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rsft_lib.chat import Span, across_edge, mask_of

try:
    import gigatoken
except ImportError:
    gigatoken = None


class Tokens(NamedTuple):
    """A text: ids int32 [tokens] and the mask's codes uint8 [tokens]."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


class ReferenceEncoder:
    """Hugging Face's tokenizer, which tells what characters a token covers."""

    name = f"tokenizers {version('tokenizers')}"

    def __init__(self, tokenizer_json: str):
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def ids(self, text: str) -> NDArray[np.int32]:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode(self, text: str, spans: list[Span]) -> Tokens:
        """Ids and mask of a text.

        Raises:
            ValueError: a token lies across the edge of a span.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        mask = mask_of(encoding.offsets, spans, text)
        return Tokens(np.array(encoding.ids, dtype=np.int32), np.array(mask, dtype=np.uint8))


class FastEncoder:
    """gigatoken, with the mask from byte lengths; has the same answers as ReferenceEncoder."""

    name = f"gigatoken {version('gigatoken')}" if gigatoken else ""

    def __init__(self, tokenizer_json: str):
        self.tokenizer_json = tokenizer_json
        self.tokenizer = gigatoken.Tokenizer.from_json(tokenizer_json)
        vocab = self.tokenizer.vocab
        self.bytes_of = np.zeros(max(vocab) + 1, dtype=np.int64)  # [vocabulary]
        self.bytes_of[list(vocab)] = [len(token) for token in vocab.values()]
        self.composes = bool(json.loads(tokenizer_json).get("normalizer"))
        self._reference = None

    @property
    def reference(self) -> ReferenceEncoder:
        if self._reference is None:
            self._reference = ReferenceEncoder(self.tokenizer_json)
        return self._reference

    def ids(self, text: str) -> NDArray[np.int32]:
        return self.tokenizer.encode(text).astype(np.int32)

    def encode(self, text: str, spans: list[Span]) -> Tokens:
        """As ReferenceEncoder.encode."""
        if self.composes and not unicodedata.is_normalized("NFC", text):
            return self.reference.encode(text, spans)
        ids = self.ids(text)
        ends = self.bytes_of[ids].cumsum()
        size = len(text) if text.isascii() else len(text.encode())
        if not len(ids) or ends[-1] != size:
            return self.reference.encode(text, spans)
        return Tokens(ids, _byte_mask(ends, spans, text))


def _byte_mask(ends: NDArray[np.int64], spans: list[Span], text: str) -> NDArray[np.uint8]:
    """The mask from the byte at which each token ends: [tokens]."""
    mask = np.zeros(len(ends), dtype=np.uint8)
    for start, end, code in spans:
        edges = (start, end) if text.isascii() else (len(text[:start].encode()), len(text[:end].encode()))
        before, last = np.searchsorted(ends, edges)  # the token that holds the byte before each edge
        for edge, token, place in zip(edges, (before, last), (start, end), strict=True):
            if edge and ends[token] != edge:
                raise ValueError(across_edge(text[max(0, place - 8) : place + 8], place))
        mask[before + 1 if start else 0 : last + 1] = code
    return mask


def best_encoder(tokenizer_json: str, texts: list[str]) -> tuple[FastEncoder | ReferenceEncoder, dict]:
    """The fastest encoder that gives Hugging Face's ids, and what was seen.

    Args:
        texts: some of the texts that will be encoded; a proof on others would say little about these.

    Returns:
        The encoder, and facts for the manifest: its name, on how many texts and bytes it was compared; `why_slow`
        says why the fast one is not used.
    """
    reference = ReferenceEncoder(tokenizer_json)
    hard = hard_texts(sorted(t.content for t in reference.tokenizer.get_added_tokens_decoder().values()))
    facts = {"encoder": reference.name, "texts_compared": len(texts), "hard_texts_compared": len(hard)}
    try:
        if gigatoken is None:
            raise ImportError("gigatoken is not installed; pip install 'rsft-lib[fast]' tokenizes 20 times faster")
        fast = FastEncoder(tokenizer_json)
        for text in [*hard, *texts]:
            _compare(fast, reference, text)
    except Exception as error:  # whatever it is, the reference goes on
        return reference, facts | {"why_slow": str(error)}
    return fast, facts | {"encoder": fast.name}


def _compare(fast: FastEncoder, reference: ReferenceEncoder, text: str) -> None:
    spans = [Span(0, len(text))] if text else []
    found, expected = fast.encode(text, spans), reference.encode(text, spans)
    if not (np.array_equal(fast.ids(text), expected.ids) and np.array_equal(found.loss_mask, expected.loss_mask)):
        raise ValueError(f"{fast.name} encodes {text[:60]!r} otherwise than {reference.name}")


def hard_texts(control_tokens: list[str], seed: int = 0) -> list[str]:
    """Texts on which tokenizers differ: scripts, emoji, combining marks, spaces, long runs, control tokens within."""
    pieces = [
        "a", "The", " the", "don't I'LL", "x1234567890", "3.14e-5", "\n", "\n\n", " \n ", "\t", "  ", "   x", "\r\n",
        "解", "数学很好", "日本語テキスト", "한국어", "Ελληνικά", "привет", "שלום", "مرحبا", "हिन्दी", "ไทย",
        "é", "e\u0301", "Å", "A\u030a", "ﬁ", "\u212b", "o\u0323\u0302", "\u1100\u1161", "\u0958",
        "🙂", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "\u200b", "\u200d", "\u00a0", "\u2028", "\ufeff", "\x00", "\x7f", "\u0085",
        "<", "<|", "<think", "</", "｜>", "\\frac{1}{2}", "{{", "}}", "{% raw %}", "`code`", "==>", "...", "!!", "'s",
    ]  # fmt: skip
    pieces += control_tokens + [token[:-1] for token in control_tokens] + [f"{token} " for token in control_tokens]
    rng = random.Random(seed)
    mixed = ["".join(rng.choices(pieces, k=rng.randint(2, 12))) for _ in range(200)]
    return ["", *pieces, *mixed, "a" * 2000, " " * 500, "\n" * 100, "é" * 300, "解" * 300, "1" * 300]


def encoder(name: str, tokenizer_json: str) -> FastEncoder | ReferenceEncoder:
    """The encoder that `best_encoder` chose, by the name in its facts."""
    return (FastEncoder if name == FastEncoder.name else ReferenceEncoder)(tokenizer_json)
