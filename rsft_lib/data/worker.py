"""A worker process in which a row becomes tokens or a reject. It imports neither torch nor megatron-core."""

import contextlib
import os
import pickle
import re
import signal
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rsft_lib.common.sandbox import limit_memory, time_limit
from rsft_lib.data.control_tokens import ControlTokens, well_formed
from rsft_lib.data.conversation import conversation, is_empty, strings
from rsft_lib.data.encoder import Encoder, Tokens, best_encoder, encoder
from rsft_lib.data.options import Options
from rsft_lib.data.records import Row, parse, size_of
from rsft_lib.data.rejects import Reject, reject
from rsft_lib.tokenizer.chat import REASONING, ChatTemplate, Span, trained_texts
from rsft_lib.tokenizer.dialect import MODE_NAMES, Opening, modes_of

# A chat template is untrusted code: if it loops endlessly or allocates gigabytes, only its row is rejected.
ROW_SECONDS, EXTRA_MEMORY = 10, 3 << 30

OPTIONAL_FIELDS = ("name", "tool_call_id")  # message fields that few chat templates render
COMPARED_CHARACTERS = 1 << 20  # characters of the dataset on which encoders are compared


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of a worker."""

    source: str
    tokenizer_json: str
    template: ChatTemplate
    added_tokens: dict[str, int]
    options: Options
    openings: tuple[Opening, ...] = ()
    """The tokens with which answers in each mode begin."""


@dataclass
class Outcomes:
    """Counts and rejected rows of a block."""

    counts: Counter
    modes: defaultdict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))
    unused: Counter = field(default_factory=Counter)
    """Number of rows by non-empty field that is not part of the conversation."""
    rejects: list[Reject] = field(default_factory=list)


@dataclass
class Block:
    """The tokens of a list of rows, as arguments of `StoreWriter.add_block`, and the outcomes."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    lengths: NDArray[np.int32]
    before: NDArray[np.int32]
    rows: NDArray[np.int64]
    outcomes: Outcomes
    size: int


class Text(NamedTuple):
    """A row as text, and its trained spans."""

    row: Row
    text: str
    spans: list[Span]


class Worker:
    """Encodes blocks of rows."""

    def __init__(self, job: Job, row_seconds: float = 0):
        """`row_seconds`: time limit per row, which requires a dedicated process; 0 for no limit."""
        self.job, self.row_seconds = job, row_seconds
        self.encoder: Encoder | None = None
        self.dialect = job.options.forms
        self.control_tokens = ControlTokens(job.added_tokens, self.dialect)
        self.shows_tools = re.search(r"\btools\b", job.template.source) is not None

    def choose_encoder(self, rows: list[Row]) -> dict:
        """Choose the encoder by comparison on the texts of `rows`; return the facts of `best_encoder`."""
        texts = [text for _, text, _ in self.texts(rows, Outcomes(Counter()))]
        ends = accumulate(map(len, texts))
        compared = [text for text, end in zip(texts, ends, strict=True) if end <= COMPARED_CHARACTERS]
        self.encoder, facts = best_encoder(self.job.tokenizer_json, compared or texts[:1])
        return facts

    def block(self, rows: list[Row], encoder_name: str) -> Block:
        """Encode rows; unusable ones are returned as rejects.

        Args:
            encoder_name: the encoder that `choose_encoder` chose, in this or another process.

        Raises:
            ValueError: a sample is too long and `overlong` is 'error'.
        """
        self.encoder = chosen = self.encoder or encoder(encoder_name, self.job.tokenizer_json)
        outcomes, samples, numbers, before = Outcomes(Counter(records=len(rows))), [], [], []
        texts = self.texts(rows, outcomes)
        for (row, _, _), sample in zip(texts, _encoded(chosen, texts), strict=True):
            if isinstance(sample, Exception):
                outcomes.rejects.append(reject(self.job.source, row, sample))
                continue
            before.append(len(sample.ids))
            first = (sample.loss_mask > 0).argmax(keepdims=True)
            mode = outcomes.modes[MODE_NAMES[modes_of(sample.ids, first, self.job.openings)[0]]]
            if fitted := self.fitted(sample, row, outcomes.counts, mode):
                samples.append(fitted)
                numbers.append(row.number)
                _count(fitted, outcomes.counts, mode)
        outcomes.counts["rejected"] = len(outcomes.rejects)
        outcomes.rejects.sort(key=lambda reject: reject.line)
        return _block(samples, before, numbers, outcomes, rows)

    def texts(self, rows: list[Row], outcomes: Outcomes) -> list[Text]:
        """The texts of the usable rows; the others are added to the rejects of `outcomes`."""
        chats, texts = [], []
        for row in rows:
            try:
                chats.append((row, *self.chat(row.content, outcomes)))
            except Exception as error:
                outcomes.rejects.append(reject(self.job.source, row, error))
        for tools, grouped in groupby(chats, key=lambda chat: chat[2]):
            group = list(grouped)
            results = self.rendered([messages for _, messages, _ in group], tools)
            for (row, messages, _), result in zip(group, results, strict=True):
                if isinstance(result, Exception):
                    outcomes.rejects.append(reject(self.job.source, row, result))
                else:
                    outcomes.unused.update(set(_not_rendered(messages, result[0])))
                    texts.append(Text(row, *result))
        return texts

    def chat(self, content: bytes | dict | Exception, outcomes: Outcomes) -> tuple[list[dict], list[dict] | None]:
        """The messages and the tools of a row.

        Raises:
            ValueError: the row is not a conversation, its text contains a control token, or an answer is not in the
                mode that was asked for.
        """
        messages, tools, unused = conversation(parse(content), self.job.options.columns)
        if self.job.options.control_tokens == "reject":
            self.control_tokens.refuse(messages, tools)
        if tools and not self.shows_tools:
            outcomes.counts["tools_not_shown"] += 1
        self.dialect.check(messages, REASONING)
        if not all(well_formed(m.get("content") or "", self.dialect) for m in messages if m["role"] == "assistant"):
            outcomes.counts["malformed_answers"] += 1
        outcomes.unused.update(unused)
        return messages, tools

    def rendered(
        self, chats: list[list[dict]], tools: list[dict] | None
    ) -> Sequence[tuple[str, list[Span]] | Exception]:
        """`trained_texts` with a time limit: all at once, which halves the time, or one by one if that fails."""
        try:
            with time_limit("the record", self.row_seconds) if self.row_seconds else contextlib.nullcontext():
                return trained_texts(self.job.template, chats, tools, self.job.options.turns, self.dialect.context)
        except Exception as error:
            return [error] if len(chats) == 1 else [self.rendered([messages], tools)[0] for messages in chats]

    def fitted(self, sample: Tokens, row: Row, counts: Counter, mode: Counter) -> Tokens | None:
        """The sample, truncated to `max_length` if necessary, or None if it is dropped.

        Raises:
            ValueError: the sample is too long and `overlong` is 'error'.
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
        outcome = "truncated" if self.job.options.overlong == "truncate" and cut.loss_mask.any() else "dropped"
        counts[outcome] += 1
        mode[outcome] += 1
        return cut if outcome == "truncated" else None


def main() -> None:
    """Serve the calls of `rsft_lib.data.pool`: first a job, then (method, arguments), until the pipe is closed."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # print to stderr, not into the results
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the notebook handles interrupts
    with contextlib.suppress(EOFError, BrokenPipeError, pickle.UnpicklingError):
        worker = Worker(pickle.loads(pickle.load(sys.stdin.buffer)), ROW_SECONDS)
        limit_memory(EXTRA_MEMORY)
        while True:
            call = pickle.load(sys.stdin.buffer)  # read the outer pickle completely, even if the inner one is invalid
            try:
                method, arguments = pickle.loads(call)
                result = pickle.dumps(getattr(worker, method)(*arguments), pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                result = _pickled(error)
            pickle.dump(result, results, pickle.HIGHEST_PROTOCOL)
            results.flush()


def _pickled(error: Exception) -> bytes:
    """A pickled error; if it cannot be pickled and unpickled, a RuntimeError with its traceback."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        return pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return pickled


def _not_rendered(messages: list[dict], text: str) -> Iterator[str]:
    """Optional message fields that the chat template did not render; required ones are checked elsewhere."""
    for message in messages:
        optional = [(f"messages[].{name}", message.get(name)) for name in OPTIONAL_FIELDS]
        if message["role"] != "assistant":
            optional += [(f"messages[].{name}", message.get(name)) for name in ("tool_calls", *REASONING)]
        for call in message.get("tool_calls") or ():
            place, required = "messages[].tool_calls[]", {"type": None, "function": None}
            optional += [(f"{place}.{key}", value) for key, value in (call | required).items()]
            required = {"name": None, "arguments": None}
            optional += [(f"{place}.function.{key}", value) for key, value in (call["function"] | required).items()]
        yield from (name for name, value in optional if not is_empty(value) and not _occurs_in(value, text))


def _occurs_in(value, text: str) -> bool:
    return all(part in text for part in ([*strings(value)] or [str(value)]))


def _encoded(encoder: Encoder, texts: list[Text]) -> list[Tokens | Exception]:
    """The tokens of each text, or why it cannot be used; all at once, or one by one if that fails."""
    try:
        samples = encoder.encode([text.text for text in texts], [text.spans for text in texts])
    except Exception as error:
        return [error] if len(texts) == 1 else [_encoded(encoder, [text])[0] for text in texts]
    return [_usable(sample) for sample in samples]


def _usable(sample: Tokens | ValueError) -> Tokens | ValueError:
    """The sample, or an error if none or all of its tokens are trained."""
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


def _block(samples: list[Tokens], before: list[int], numbers: list[int], outcomes: Outcomes, rows: list[Row]) -> Block:
    none = Tokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8))
    ids, masks = zip(none, *samples, strict=True)
    return Block(
        tokens=np.concatenate(ids),
        loss_mask=np.concatenate(masks),
        lengths=np.array([len(sample.ids) for sample in samples], dtype=np.int32),
        before=np.array(before, dtype=np.int32),
        rows=np.array(numbers, dtype=np.int64),
        outcomes=outcomes,
        size=sum(map(size_of, rows)),
    )
