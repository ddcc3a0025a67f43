"""One of the processes that turn rows into tokens; it imports neither torch nor megatron-core, so it starts quickly."""

import contextlib
import os
import pickle
import re
import signal
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsft_lib.chat import END_THINK, MODES, ChatTemplate, Span, trained_texts
from rsft_lib.data.encoder import Tokens, best_encoder, encoder
from rsft_lib.data.records import Row, as_text, conversation, parse, tools_of
from rsft_lib.data.rejects import Reject
from rsft_lib.sandbox import limit_memory, time_limit

# A chat template is somebody's code: one that loops for ever or builds a gigabyte costs its row, not the machine.
ROW_SECONDS, EXTRA_MEMORY = 10, 3 << 30

PROOF_CHARACTERS = 1 << 20  # of this very dataset, on which encoders are compared


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the tokens of a record, besides tokenizer and template."""

    max_length: int = 16384
    """Most tokens of a sample."""
    overlong: str = "drop"
    """Longer ones are left out ('drop'), cut without an EOS ('truncate'), or end the work ('error')."""
    turns: str = "all"
    """Every answer of a conversation is trained ('all') or the last one only ('last')."""
    control_tokens: str = "reject"
    """A record whose text spells a control token is refused ('reject'), or the text becomes the token ('allow')."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the dataset calls a field, e.g. {'prompt': 'question', 'response': 'answer'}."""

    def __post_init__(self):
        choices = {"overlong": ("drop", "truncate", "error"), "turns": ("all", "last"),
                   "control_tokens": ("reject", "allow")}  # fmt: skip
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}; a sample has at least 2 tokens")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to know."""

    source: str
    tokenizer_json: str
    template: ChatTemplate
    added_tokens: dict[str, int]
    options: Options


@dataclass
class Block:
    """The tokens of a list of rows, as `StoreWriter.add_block` takes them, and what became of each row."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    before: NDArray[np.int32]
    rejects: list[Reject]
    counts: Counter
    modes: dict[str, Counter]
    size: int


class Text(NamedTuple):
    """A row as text, and what of it is trained."""

    row: Row
    text: str
    spans: list[Span]


class Worker:
    """Encodes blocks of rows by the rules of a job."""

    def __init__(self, job: Job, row_seconds: float = 0):
        """`row_seconds` is the longest that a row may take; 0 for no limit, which needs a process of one's own."""
        self.job, self.row_seconds, self.encoder = job, row_seconds, None
        self.modes = {job.added_tokens.get(token): mode for mode, token in MODES.items()}
        tokens = {token for token in job.added_tokens if token.strip()}
        self.forbidden = {"assistant": _any_of(tokens - {*MODES.values(), END_THINK}), "": _any_of(tokens)}
        self.shows_tools = re.search(r"\btools\b", job.template.source) is not None

    def prove(self, rows: list[Row]) -> dict:
        """Choose the encoder on the texts of `rows`; the facts of `best_encoder`."""
        texts = [text for _, text, _ in self.texts(rows, Counter(), [])]
        ends = accumulate(map(len, texts))
        some = [text for text, end in zip(texts, ends, strict=True) if end <= PROOF_CHARACTERS]
        self.encoder, facts = best_encoder(self.job.tokenizer_json, some or texts[:1])
        return facts

    def block(self, rows: list[Row], encoder_name: str) -> Block:
        """Encode rows; one that cannot be used is returned among the rejects.

        Args:
            encoder_name: what `prove` chose, here or in another process.

        Raises:
            ValueError: a sample is too long and `overlong` is 'error'.
        """
        if self.encoder is None:
            self.encoder = encoder(encoder_name, self.job.tokenizer_json)
        counts, modes, samples, before, rejects = Counter(records=len(rows)), defaultdict(Counter), [], [], []
        texts = self.texts(rows, counts, rejects)
        encoded = self.encoder.encode([t.text for t in texts], [t.spans for t in texts])
        for (row, _, _), sample in zip(texts, encoded, strict=True):
            if problem := _problem(sample):
                rejects.append(self.reject(row, problem))
                continue
            before.append(len(sample.ids))
            mode = modes[self.modes.get(int(sample.ids[sample.loss_mask.argmax()]), "other")]
            if sample := self.fitted(sample, row, counts, mode):
                samples.append(sample)
                _count(sample, counts, mode)
        counts["rejected"] = len(rejects)
        return _block(samples, before, sorted(rejects), counts, dict(modes), rows)

    def texts(self, rows: list[Row], counts: Counter, rejects: list[Reject]) -> list[Text]:
        """The rows that can be used, as texts; the others are added to `rejects`."""
        chats, done = [], []
        for row in rows:
            try:
                chats.append((row, *self.chat(row.content, counts)))
            except ValueError as error:
                rejects.append(self.reject(row, error))
        for tools, group in groupby(chats, key=lambda chat: chat[2]):
            group = list(group)
            for (row, _, _), result in zip(group, self.rendered([chat[1] for chat in group], tools), strict=True):
                if isinstance(result, ValueError):
                    rejects.append(self.reject(row, result))
                else:
                    done.append(Text(row, *result))
        return done

    def chat(self, content: bytes | dict, counts: Counter) -> tuple[list[dict], list[dict] | None]:
        """The messages and the tools of a row.

        Raises:
            ValueError: the row is no conversation, or a text in it spells a control token.
        """
        record = parse(content)
        messages, tools = conversation(record, self.job.options.columns), tools_of(record)
        if self.job.options.control_tokens == "reject":
            self.refuse_control_tokens(messages, tools)
        if tools and not self.shows_tools:
            counts["tools_not_shown"] += 1
        return messages, tools

    def rendered(self, chats: list[list[dict]], tools: list[dict] | None) -> list[tuple[str, list[Span]] | ValueError]:
        """`trained_texts` within limits: of all at once, which takes half the time, or of each where that fails."""
        try:
            with time_limit("the record", self.row_seconds) if self.row_seconds else contextlib.nullcontext():
                return trained_texts(self.job.template, chats, tools, self.job.options.turns)
        except ValueError as error:
            return [error] if len(chats) == 1 else [self.rendered([messages], tools)[0] for messages in chats]

    def fitted(self, sample: Tokens, row: Row, counts: Counter, mode: Counter) -> Tokens | None:
        """The sample within `max_length`, or None where it is dropped.

        Raises:
            ValueError: it is too long and `overlong` is 'error'.
        """
        limit = self.job.options.max_length
        if len(sample.ids) <= limit:
            return sample
        if self.job.options.overlong == "error":
            raise ValueError(
                f"{self.job.source}:{row.number}: the sample has {len(sample.ids)} tokens, max_length is {limit}; "
                "raise it, or set overlong to 'drop' or 'truncate'"
            )
        cut = Tokens(sample.ids[:limit], sample.loss_mask[:limit])
        fate = "truncated" if self.job.options.overlong == "truncate" and cut.loss_mask.any() else "dropped"
        counts[fate] += 1
        mode[fate] += 1
        return cut if fate == "truncated" else None

    def reject(self, row: Row, reason: str | ValueError) -> Reject:
        return Reject(self.job.source, row.number, str(reason), as_text(row.content))

    def refuse_control_tokens(self, messages: list[dict], tools: list | None) -> None:
        """Text must not become a control token by chance; answers may hold those of thinking.

        Raises:
            ValueError: a text of the record spells one.
        """
        for place, part, role in [*((f"messages[{i}]", m, m["role"]) for i, m in enumerate(messages)),
                                  ("tools", tools, "")]:  # fmt: skip
            pattern = self.forbidden.get(role, self.forbidden[""])
            for text in _texts(part):
                if found := pattern.search(text):
                    raise ValueError(
                        f"{place}: the text holds {found[0]!r} at character {found.start()}, which would become a "
                        "control token; remove it, or set control_tokens to 'allow'"
                    )


def main() -> None:
    """Serve the calls of `rsft_lib.data.pool`: first a job, then (method, arguments), until the parent goes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints does not write among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the notebook
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        worker = Worker(pickle.load(sys.stdin.buffer), ROW_SECONDS)
        limit_memory(EXTRA_MEMORY)
        while True:
            method, arguments = pickle.load(sys.stdin.buffer)
            try:
                answer = pickle.dumps(getattr(worker, method)(*arguments), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = _pickled(error)
            answers.write(answer)
            answers.flush()


def _pickled(error: Exception) -> bytes:
    """An error for the parent; where it cannot be pickled, or not read back, its traceback as the text of another."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return pickled


def _problem(sample: Tokens | ValueError) -> str:
    """Why the tokens of a row cannot be trained, or nothing."""
    if isinstance(sample, ValueError):
        return str(sample)
    trained = np.count_nonzero(sample.loss_mask)
    if trained in (0, len(sample.ids)):
        return f"{trained} of {len(sample.ids)} tokens would be trained; is this the right template?"
    return ""


def _count(sample: Tokens, *counters: Counter) -> None:
    tokens, trained = len(sample.ids), int(np.count_nonzero(sample.loss_mask))
    for counter in counters:
        counter["written"] += 1
        counter["tokens"] += tokens
        counter["trained_tokens"] += trained


def _block(samples: list[Tokens], before: list[int], rejects, counts, modes, rows: list[Row]) -> Block:
    none = Tokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8))
    ids, masks = zip(none, *samples, strict=True)
    return Block(
        tokens=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        lengths=np.array([len(sample.ids) for sample in samples], dtype=np.int32),
        before=np.array(before, dtype=np.int32),
        rejects=rejects,
        counts=counts,
        modes=modes,
        size=sum(len(row.content) for row in rows),
    )


def _any_of(tokens: set[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _texts(value) -> Iterator[str]:
    """Every text in a message or a list of tools; names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
