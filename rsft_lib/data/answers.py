"""Extract the final answer of a text, and normalize it so that equal answers compare equal as strings."""

import importlib.util
import re
import unicodedata
from fractions import Fraction

from rsft_lib.tokenizer.dialect import END_THINK, SHORT

MARKS = re.compile(r"^####(?!#)|\bAnswer\**:\**|\\boxed\s*\{", re.M)
TAIL = 2000  # characters at the end of a text that are searched for the final answer
UNIT = re.compile(r"(?<=\w)(?:\\ |~|\s)*\\(?:text|mathrm|mbox)\{[^{}]*\}$|(?<=\d)\s+[^\W\d][^\d=<>]*$")
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
IGNORED = re.compile(r"\\(?:left|right|[!,;: ])|[\s$€£*{}]|^[a-z]\s*=")
FORMULA = re.compile(r"[\d\\+*/^=<>-]")
NUMBER = re.compile(r"([+-]?\d{1,40}(?:\.\d{0,40})?)(?:/(\d{1,40}))?%?")


def final_answer(text: str) -> str | None:
    r"""The x of the last `Answer: x`, `\boxed{x}` or final line `#### x` of a text, unchanged; None if there is none.

    A chain of thought, everything up to `</think>`, is ignored.

    >>> final_answer("so 24 + 48 = 72.\n#### 72")
    '72'
    """
    text = text.removeprefix(SHORT)[-TAIL:].rpartition(END_THINK)[2]
    for mark in reversed(list(MARKS.finditer(text))):
        rest = text[mark.end() :]
        if mark[0].endswith("{"):
            answer = _braced(rest)
        elif mark[0] == "####":
            answer = "" if "\n" in rest.strip() else rest  # followed by more lines, it is a heading
        else:
            answer = rest.lstrip().partition("\n")[0]
        if answer.strip():
            return answer.strip()
    return None


def normalized(answer: str) -> str:
    r"""An answer without differences of form: spaces, case, currency, markup, thousands separators, units.

    Numbers become exact fractions: 1,000 equals 1000.0, \frac{1}{2} equals 0.5, $18 equals `18 dollars`. Percent signs
    are removed, since the question determines whether the answer is a percentage.
    """
    text = unicodedata.normalize("NFKC", answer).replace("\\%", "%").replace("\\$", "$").replace("−", "-")
    text = WRAPPED.sub(r"\1", UNIT.sub("", text.strip(" \t*.$"))).casefold()
    text = IGNORED.sub("", FRACTION.sub(r"\1/\2", text)).rstrip(".")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    number = NUMBER.fullmatch(text)
    if number and int(number[2] or 1):
        return str(Fraction(number[1]) / int(number[2] or 1))
    return text


def has_math_verify() -> bool:
    """Whether math-verify is installed, `pip install -e '.[math]'` in a checkout."""
    return importlib.util.find_spec("math_verify") is not None


def equal_by_math_verify(answer: str, expected: str) -> bool:
    """Whether math-verify computes two final answers to be equal, such as `2(x + 1)` and `2x + 2`; False for words.

    https://github.com/huggingface/Math-Verify
    """
    from math_verify import parse, verify

    if not FORMULA.search(expected):  # `two` would be the product of its letters, whatever their order
        return False
    return verify(*(parse(f"${text.strip('$')}$") for text in (expected, answer)))


def _braced(text: str) -> str:
    """The text before the brace that closes an already open one; empty if it is not closed."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()]
    return ""
