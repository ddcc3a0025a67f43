"""The final answer of a text, and a form of it in which equal answers are equal texts."""

import re
import unicodedata
from fractions import Fraction

from rsft_lib.tokenizer.chat import END_THINK, SHORT

MARKS = re.compile(r"^####(?!#)|\bAnswer\**:\**|\\boxed\s*\{", re.M)
CLOSING = 2000  # characters at the end of a text in which its final answer is looked for
UNIT = re.compile(r"(?<=\w)(?:\\ |~|\s)*\\(?:text|mathrm|mbox)\{[^{}]*\}$|(?<=\d)\s+[^\W\d][^\d=<>]*$")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
IGNORED = re.compile(r"\\(?:left|right|[!,;: ])|[\s$€£*{}]|^[a-z]\s*=")
NUMBER = re.compile(r"([+-]?\d{1,40}(?:\.\d{0,40})?)(?:/(\d{1,40}))?%?")


def final_answer(text: str) -> str | None:
    r"""What the last `Answer: x`, `\boxed{x}` or closing line `#### x` of a text says, as written, or None.

    What a chain of thought says, before `</think>`, is no answer.

    >>> final_answer("so 24 + 48 = 72.\n#### 72")
    '72'
    """
    text = text.removeprefix(SHORT)[-CLOSING:].rpartition(END_THINK)[2]
    for mark in reversed(list(MARKS.finditer(text))):
        rest = text[mark.end() :]
        if mark[0].endswith("{"):
            answer = _braced(rest)
        elif mark[0] == "####":
            answer = "" if "\n" in rest.strip() else rest  # one that more lines follow is a heading
        else:
            answer = rest.lstrip().partition("\n")[0]
        if answer.strip():
            return answer.strip()
    return None


def normalized(answer: str) -> str:
    r"""An answer without what does not change it: spaces, case, currency, markup, thousands separators, units.

    Numbers become exact fractions: 1,000 is 1000.0, \frac{1}{2} is 0.5, $18 is `18 dollars`. A percent sign goes
    too, since the question says whether it is one.
    """
    text = unicodedata.normalize("NFKC", answer).replace("\\%", "%").replace("\\$", "$").replace("−", "-")
    text = WRAPPED.sub(r"\1", UNIT.sub("", text.strip(" \t*.$"))).casefold()
    text = IGNORED.sub("", FRACTION.sub(r"\1/\2", text)).rstrip(".")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    number = NUMBER.fullmatch(text)
    if number and int(number[2] or 1):
        return str(Fraction(number[1]) / int(number[2] or 1))
    return text


def _braced(text: str) -> str:
    """The text up to the brace that closes one open before it; empty where none does."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""
