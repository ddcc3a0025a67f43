"""Find questions that share a run of 13 words with a question of an evaluation set.

Words are runs of letters and digits (a Chinese character or Japanese kana is a word of its own), and the signs
+ - * / ^ = < > % and other mathematical symbols, for `3 + 4` is another question than `3 - 4`. Case, white space, other
punctuation, markup (`**`), hyphens between letters, and Unicode's ways of writing a character (NFKC) do not count.

13 words are those of GPT-3, https://arxiv.org/abs/2005.14165, appendix C, which ignores runs in more than 10 training
documents as common phrases. So here, too: a run in more than 10 questions, or in more than 10 or half of the evaluation
questions, is a *form*, such as "put the final answer in a box", and no leak. A question that contains the whole of an
evaluation question always is one.
"""

import re
import unicodedata
from collections import Counter
from functools import cached_property
from typing import NamedTuple

LENGTH = 13  # words
COMMON = 10  # questions; a run of words in more of them is a form
ALONE = "぀-ヿ㐀-鿿豈-﫿"  # kana and Chinese characters: they are written without spaces
LETTER = r"[^\W\d_]"
WORD = re.compile(rf"[{ALONE}]|[^\W_{ALONE}]+|(?<!\*)\*(?!\*)|[+/^=<>%~±×÷∓∑√∫≠≤≥]|(?<!{LETTER})[-−]|[-−](?!{LETTER})")


class Match(NamedTuple):
    """What a question shares with an evaluation question: the question's own text, its number of words, and where.

    `form`: all that it shares are forms.
    """

    text: str
    words: int
    place: str
    form: bool = False


class EvaluationQuestions:
    """The runs of words of evaluation questions; takes about 300 bytes of memory for each of their words.

    First `add` all evaluation questions, then `count` all questions, then `find` each of them.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self.whole: dict[str, int] = {}
        self.runs: dict[str, int] = {}  # the words themselves are the keys, so that equal hashes are no match
        self.others: Counter[str] = Counter()  # run -> further evaluation questions that have it
        self.asked: Counter[str] = Counter()  # run -> questions that have it

    def add(self, place: str, text: str) -> None:
        """Add an evaluation question; one that is equal to an earlier one, as in another file, does not count again."""
        words = normalized_words(text)
        if self.whole.setdefault(" ".join(words), len(self.places)) < len(self.places):
            return
        for run in {*_runs(words)}:
            self.others[run] += self.runs.setdefault(run, len(self.places)) < len(self.places)
        self.places.append(place)

    def count(self, text: str) -> None:
        """Count the runs of a question, each distinct question once."""
        self.asked.update({*_runs(normalized_words(text))} & self.runs.keys())

    def find(self, text: str) -> Match | None:
        """The longest text that a question shares with evaluation questions, or None.

        One of fewer than 13 words must be equal to the whole of one.
        """
        text = unicodedata.normalize("NFKC", text)
        found, words = list(WORD.finditer(text)), normalized_words(text)

        def match(first: int, count: int, number: int, form: bool = False) -> Match:
            shared = text[found[first].start() : found[first + count - 1].end()]
            return Match(shared, count, self.places[number], form)

        if words and (number := self.whole.get(" ".join(words))) is not None:
            return match(0, len(words), number)
        runs = _runs(words)
        hits = [at for at, run in enumerate(runs) if run in self.runs]
        for at in hits:
            for offset, other in self._by_rarest_run.get(runs[at], ()):
                if at >= offset and words[at - offset : at - offset + len(other)] == other:
                    return match(at - offset, len(other), self.whole[" ".join(other)])
        if not hits:
            return None
        rare = [at for at in hits if not self._is_form(runs[at])]
        first, last = _longest(rare or hits)
        return match(first, last - first + LENGTH, self.runs[runs[first]], form=not rare)

    def _is_form(self, run: str) -> bool:
        limit = max(1, min(COMMON, len(self.places) // 2))
        return self.others[run] >= limit or self.asked[run] > COMMON

    @cached_property
    def _by_rarest_run(self) -> dict[str, list[tuple[int, list[str]]]]:
        """The words of each evaluation question by the run that the fewest others have, with its position in them."""
        found: dict[str, list[tuple[int, list[str]]]] = {}
        for whole in self.whole:
            words = whole.split(" ")
            if runs := _runs(words):
                offset = min(range(len(runs)), key=lambda at: self.others[runs[at]])
                found.setdefault(runs[offset], []).append((offset, words))
        return found


def normalized_words(text: str) -> list[str]:
    """The words of a text as they are compared.

    >>> normalized_words("**Find** the two-digit x: 3·x − 4 = 1,000?")
    ['find', 'the', 'two', 'digit', 'x', '3', 'x', '-', '4', '=', '1', '000']
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text))
    return [unicodedata.normalize("NFKC", word.casefold()).replace("−", "-") for word in words]


def signs(text: str) -> str:
    """The brackets, mathematical symbols, and `!` and `|`, of a text, by which questions of the same words differ.

    >>> signs("Is (3 + 4)! = 7?")
    '(+)!='
    """
    text = unicodedata.normalize("NFKC", text)
    return "".join(sign for sign in text if sign in "!|" or unicodedata.category(sign) in ("Sm", "Ps", "Pe"))


def _runs(words: list[str]) -> list[str]:
    return [" ".join(words[at : at + LENGTH]) for at in range(len(words) - LENGTH + 1)]


def _longest(numbers: list[int]) -> tuple[int, int]:
    """The first and the last of the longest stretch of consecutive numbers; `numbers` ascend."""
    stretches = [(numbers[0], numbers[0])]
    for number in numbers[1:]:
        first, last = stretches[-1]
        stretches[-1:] = [(first, number)] if number == last + 1 else [stretches[-1], (number, number)]
    return max(stretches, key=lambda stretch: stretch[1] - stretch[0])
