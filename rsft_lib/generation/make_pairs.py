"""Choose the right ones among sampled answers: long and short answers to the same questions, for notebook 03."""

import json
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rsft_lib.common.artifact import file_hash, new_folder, reusable
from rsft_lib.common.paths import resolve
from rsft_lib.common.progress import progress
from rsft_lib.data.answers import equal_by_math_verify, final_answer, has_math_verify
from rsft_lib.data.clean_questions import text_of
from rsft_lib.data.records import read_records
from rsft_lib.generation.answer import Answer, is_correct, well_formed
from rsft_lib.generation.sampled_answers import Asked, read_answers, read_questions
from rsft_lib.tokenizer.dialect import END_THINK, MODES, SHORT, THINK

PAIRS, LEFT_OUT = "pairs.jsonl", "left_out.jsonl"
KIT, MATH_VERIFY = "kit", "math-verify"
PROBLEMS = ("both", "think_only", "short_only", "neither")
SHARE = {"think": "long_right", "short": "short_right"}


class Judged(NamedTuple):
    """An answer, its text in the form of its mode or None if it is not well-formed, and by what it is right or ''."""

    answer: Answer
    text: str | None
    right: str


def make_pairs(questions: str | Path, asked: list[Asked], answers: str | Path, folder: str | Path) -> dict:
    """Write `pairs.jsonl`, of each question the shortest right answer in each mode; all answers must be written.

    An answer is right if it is well-formed, ends, and its final answer equals the known one by the kit's comparison
    (`data.answers`) or, if math-verify is installed, by that. The lines are a hybrid dataset for notebook 03, the long
    answer first; `long_right` and `short_right` are the shares of right answers to the question in [0, 1], and
    `verified` marks an answer that is right by math-verify alone. `left_out.jsonl` lists the questions without a right
    answer.

    Returns:
        The manifest. `problems`: numbers of questions by the modes of their right answers; `modes`: for each mode
        numbers of answers, well-formed, right and cut off, and the sum of their tokens; `shares`: [right short
        answers, right long answers, questions] of each combination; `by_math_verify`: answers right by that alone.

    Raises:
        FileExistsError: `folder` is something else.
    """
    file, destination = resolve(questions), resolve(folder)
    judges = [KIT, f"{MATH_VERIFY} {version(MATH_VERIFY)}"] if has_math_verify() else [KIT]
    facts: dict[str, Any] = {
        "made_by": "make_pairs", "questions": str(file), "questions_sha256": file_hash(file), "judges": judges,
        "asked": [{**one._asdict(), "sampling": one.sampling._asdict()} for one in asked],
    }  # fmt: skip
    if done := reusable(destination, facts):
        return done
    tally = _Tally()
    with (
        new_folder(destination, facts) as temporary,
        (temporary / PAIRS).open("w", encoding="utf-8") as pairs,
        (temporary / LEFT_OUT).open("w", encoding="utf-8") as left_out,
    ):
        for record, judged in _judged(file, asked, resolve(answers)):
            tally.add(judged)
            chosen = _chosen(record, judged)
            pairs.writelines(map(_line, chosen))
            if not chosen:
                left_out.write(_line(_refused(record, judged)))
        facts |= tally.facts()
    return facts


class _Tally:
    """Counts of answers and questions."""

    def __init__(self) -> None:
        self.modes = {mode: Counter[str]() for mode in MODES}
        self.shares, self.by_math_verify = Counter[tuple[int, int]](), 0

    def add(self, judged: dict[str, list[Judged]]) -> None:
        for mode, found in judged.items():
            self.modes[mode] += Counter(
                answers=len(found), well_formed=sum(one.text is not None for one in found),
                right=sum(bool(one.right) for one in found), tokens=sum(one.answer.tokens for one in found),
                cut_off=sum(not one.answer.ended for one in found),
            )  # fmt: skip
            self.by_math_verify += sum(one.right == MATH_VERIFY for one in found)
        short, long = (sum(bool(one.right) for one in judged[mode]) for mode in ("short", "think"))
        self.shares[short, long] += 1

    def facts(self) -> dict:
        names = ("answers", "well_formed", "right", "cut_off", "tokens")
        problems = dict.fromkeys(PROBLEMS, 0)
        for (short, long), count in self.shares.items():
            problems[PROBLEMS[(not short) + 2 * (not long)]] += count
        return {
            "modes": {mode: {name: count[name] for name in names} for mode, count in self.modes.items()},
            "shares": [[*right, count] for right, count in sorted(self.shares.items())],
            "problems": problems, "by_math_verify": self.by_math_verify,
        }  # fmt: skip


def _judged(file: Path, asked: list[Asked], answers: Path) -> Iterator[tuple[dict, dict[str, list[Judged]]]]:
    """Each question with its answers in each mode."""
    records = [record for _, record in read_records(file)]
    read = [read_answers(one, read_questions(file), answers) for one in asked]
    with progress("verify", " questions", len(records)) as bar:
        for record, *of_modes in zip(records, *read, strict=True):
            by_mode = zip((one.mode for one in asked), of_modes, strict=True)
            yield record, {mode: [_judge(one, mode, record["answer"]) for one in found] for mode, found in by_mode}
            bar.update(1)


def _judge(answer: Answer, mode: str, expected: str) -> Judged:
    text = _as_pair(answer, mode)
    if text is None:
        return Judged(answer, None, "")
    if is_correct(answer, expected):
        return Judged(answer, text, KIT)
    final = final_answer(answer.text)
    by_other = final and has_math_verify() and equal_by_math_verify(final, expected)
    return Judged(answer, text, MATH_VERIFY if by_other else "")


def _as_pair(answer: Answer, mode: str) -> str | None:
    """A well-formed answer as notebook 03 reads it, whatever the dialect of the model that wrote it; else None."""
    if not well_formed(answer, mode if mode in answer.dialect.forms else "other"):
        return None
    thoughts, _, rest = answer.text.removeprefix(SHORT).rpartition(END_THINK)
    thoughts = thoughts.removeprefix(THINK).strip()
    if mode == "short":
        return SHORT + rest.strip()
    return f"{THINK}\n{thoughts}\n{END_THINK}\n\n{rest.strip()}" if thoughts else None


def _chosen(record: dict, judged: dict[str, list[Judged]]) -> list[dict]:
    """The pair of a question, or the one answer that is right, or none."""
    shares = {SHARE[mode]: sum(bool(one.right) for one in own) / max(1, len(own)) for mode, own in judged.items()}
    chosen = []
    for own in judged.values():
        if right := [one for one in own if one.right]:
            best = min(right, key=lambda one: one.answer.tokens)  # the first of equally long ones
            messages = [*record["messages"], {"role": "assistant", "content": best.text}]
            by_other = {"verified": best.right} if best.right != KIT else {}
            chosen.append(record | {"messages": messages} | shares | by_other)
    return chosen


def _refused(record: dict, judged: dict[str, list[Judged]]) -> dict:
    """A question without a right answer, with the final answers that were given."""
    said = {mode: [final_answer(one.answer.text) for one in own] for mode, own in judged.items()}
    return {"question": text_of(record["messages"]), "answer": record["answer"], "said": said}


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
