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

from rsft_lib.common.sandbox import limit_memory, time_limit
from rsft_lib.data.control_tokens import ControlTokens, well_formed
from rsft_lib.data.conversation import conversation, is_empty, strings
from rsft_lib.data.encoder import Tokens, best_encoder, encoder
from rsft_lib.data.records import Row, parse, size_of
from rsft_lib.data.rejects import Reject, reject
from rsft_lib.tokenizer.chat import MODES, REASONING, ChatTemplate, Span, trained_texts

# A chat template is somebody's code: one that loops for ever or builds a gigabyte costs its row, not the machine.
ROW_SECONDS, EXTRA_MEMORY = 10, 3 << 30

MAY_BE_LEFT_OUT = ("name", "tool_call_id")  # fields of a message that few chat templates show
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
class Fates:
    """What became of the rows of a block."""

    counts: Counter
    modes: defaultdict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    unused: Counter = field(default_factory=Counter)
    """Rows by the names of fields that hold something and are no part of the conversation."""
    rejects: list[Reject] = field(default_factory=list)


@dataclass
class Block:
    """The tokens of a list of rows, as `StoreWriter.add_block` takes them, and what became of each row."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    before: NDArray[np.int32]
    rows: NDArray[np.int64]
    fates: Fates
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
        self.control_tokens = ControlTokens(job.added_tokens)
        self.shows_tools = re.search(r"\btools\b", job.template.source) is not None

    def prove(self, rows: list[Row]) -> dict:
        """Choose the encoder on the texts of `rows`; the facts of `best_encoder`."""
        texts = [text for _, text, _ in self.texts(rows, Fates(Counter()))]
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
        fates, samples, numbers, before = Fates(Counter(records=len(rows))), [], [], []
        texts = self.texts(rows, fates)
        for (row, _, _), sample in zip(texts, self.encoded(texts), strict=True):
            if isinstance(sample, Exception):
                fates.rejects.append(reject(self.job.source, row, sample))
                continue
            before.append(len(sample.ids))
            mode = fates.modes[self.modes.get(int(sample.ids[(sample.loss_mask > 0).argmax()]), "other")]
            if sample := self.fitted(sample, row, fates.counts, mode):
                samples.append(sample)
                numbers.append(row.number)
                _count(sample, fates.counts, mode)
        fates.counts["rejected"] = len(fates.rejects)
        fates.rejects.sort(key=lambda reject: reject.line)
        return _block(samples, before, numbers, fates, rows)

    def texts(self, rows: list[Row], fates: Fates) -> list[Text]:
        """The rows that can be used, as texts; the others are added to the rejects of `fates`."""
        chats, done = [], []
        for row in rows:
            try:
                chats.append((row, *self.chat(row.content, fates)))
            except Exception as error:
                fates.rejects.append(reject(self.job.source, row, error))
        for tools, group in groupby(chats, key=lambda chat: chat[2]):
            group = list(group)
            found = self.rendered([messages for _, messages, _ in group], tools)
            for (row, messages, _), result in zip(group, found, strict=True):
                if isinstance(result, Exception):
                    fates.rejects.append(reject(self.job.source, row, result))
                else:
                    fates.unused.update(set(_not_shown(messages, result[0])))
                    done.append(Text(row, *result))
        return done

    def chat(self, content: bytes | dict, fates: Fates) -> tuple[list[dict], list[dict] | None]:
        """The messages and the tools of a row.

        Raises:
            ValueError: the row is not a conversation, or a text in it spells a control token.
        """
        messages, tools, unused = conversation(parse(content), self.job.options.columns)
        if self.job.options.control_tokens == "reject":
            self.control_tokens.refuse(messages, tools)
        if tools and not self.shows_tools:
            fates.counts["tools_not_shown"] += 1
        if not all(well_formed(m.get("content") or "") for m in messages if m["role"] == "assistant"):
            fates.counts["malformed_answers"] += 1
        fates.unused.update(unused)
        return messages, tools

    def rendered(self, chats: list[list[dict]], tools: list[dict] | None) -> list[tuple[str, list[Span]] | Exception]:
        """`trained_texts` within limits: of all at once, which takes half the time, or of each where that fails."""
        try:
            with time_limit("the record", self.row_seconds) if self.row_seconds else contextlib.nullcontext():
                return trained_texts(self.job.template, chats, tools, self.job.options.turns)
        except Exception as error:
            return [error] if len(chats) == 1 else [self.rendered([messages], tools)[0] for messages in chats]

    def encoded(self, texts: list[Text]) -> list[Tokens | Exception]:
        """The tokens of each text, or why they cannot be trained; all at once, or one by one where that fails."""
        try:
            found = self.encoder.encode([text.text for text in texts], [text.spans for text in texts])
        except Exception as error:
            return [error] if len(texts) == 1 else [self.encoded([text])[0] for text in texts]
        return [_usable(sample) for sample in found]

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


def main() -> None:
    """Serve the calls of `rsft_lib.data.pool`: first a job, then (method, arguments), until the parent goes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints does not write among the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the notebook
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        worker = Worker(pickle.loads(pickle.load(sys.stdin.buffer)), ROW_SECONDS)
        limit_memory(EXTRA_MEMORY)
        while True:
            call = pickle.load(sys.stdin.buffer)  # to its end, so that the next is found whatever is in this one
            try:
                method, arguments = pickle.loads(call)
                answer = pickle.dumps(getattr(worker, method)(*arguments), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                answer = _pickled(error)
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _pickled(error: Exception) -> bytes:
    """An error for the parent; where it cannot be pickled, or not read back, its traceback as the text of another."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return pickled


def _not_shown(messages: list[dict], text: str) -> Iterator[str]:
    """Fields of messages whose content the chat template may leave out, and did. All else has been checked."""
    for message in messages:
        found = [(f"messages[].{name}", message.get(name)) for name in MAY_BE_LEFT_OUT]
        if message["role"] != "assistant":
            found += [(f"messages[].{name}", message.get(name)) for name in ("tool_calls", *REASONING)]
        for call in message.get("tool_calls") or ():
            place, rest = "messages[].tool_calls[]", {"type": None, "function": None}
            found += [(f"{place}.{key}", value) for key, value in (call | rest).items()]
            rest = {"name": None, "arguments": None}
            found += [(f"{place}.function.{key}", value) for key, value in (call["function"] | rest).items()]
        yield from (name for name, value in found if not is_empty(value) and not _stands_in(value, text))


def _stands_in(value, text: str) -> bool:
    return all(part in text for part in ([*strings(value)] or [str(value)]))


def _usable(sample: Tokens | ValueError) -> Tokens | ValueError:
    """The sample, or the error that its mask trains nothing or everything of it."""
    if isinstance(sample, ValueError):
        return sample
    trained = np.count_nonzero(sample.loss_mask)
    if trained in (0, len(sample.ids)):
        return ValueError(f"{trained} of {len(sample.ids)} tokens would be trained; is this the right template?")
    return sample


def _count(sample: Tokens, *counters: Counter) -> None:
    tokens, trained = len(sample.ids), int(np.count_nonzero(sample.loss_mask))
    for counter in counters:
        counter["written"] += 1
        counter["tokens"] += tokens
        counter["trained_tokens"] += trained


def _block(samples: list[Tokens], before: list[int], numbers: list[int], fates: Fates, rows: list[Row]) -> Block:
    none = Tokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8))
    ids, masks = zip(none, *samples, strict=True)
    return Block(
        tokens=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        lengths=np.array([len(sample.ids) for sample in samples], dtype=np.int32),
        before=np.array(before, dtype=np.int32),
        rows=np.array(numbers, dtype=np.int64),
        fates=fates,
        size=sum(map(size_of, rows)),
    )
