"""Recall and precision of the search for evaluation questions, on all real questions.

    RSFT_REAL_DATA=FOLDER python benchmarks/decontaminate.py [--seed 1]

A twentieth of the questions are the evaluation set. Each of these is planted once among the others, changed in one of
`CHANGES`. Beside these, a flagged question is a true overlap if it shares 13 words with an evaluation question by
`overlaps`, which knows nothing of the code under test. It prints those, to be judged by eye.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rsft_lib.data.clean_questions import clean_questions
from rsft_lib.data.records import read_rows

REAL = Path(os.environ["RSFT_REAL_DATA"]) / "data"
CHANGES = {
    "as it is": lambda text: text,
    "case and space": lambda text: "  \n".join(text.upper().split()),
    "punctuation": lambda text: re.sub(r"[.,?!]", ";", f"**{text}**").replace("'", "’"),
    "within another text": lambda text: f"Here is an exercise from my book. {text} Explain it to a child.",
    "its last two thirds": lambda text: text[len(text) // 3 :].partition(" ")[2],
}
LONG_ENOUGH = 24  # words, so that two thirds of them are more than 13


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    rng = random.Random(parser.parse_args().seed)
    questions = [*dict.fromkeys(real_questions())]
    rng.shuffle(questions)
    tests, others = questions[: len(questions) // 20], questions[len(questions) // 20 :]
    planted = [plant(source, text, number) for number, (source, text) in enumerate(tests)]
    asked = [*((source, "", text) for source, text in others), *planted]
    rng.shuffle(asked)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "evaluation.jsonl", [text for _, text in tests])
        write(folder / "questions.jsonl", [text for *_, text in asked])
        began = time.perf_counter()
        made = clean_questions(folder / "questions.jsonl", folder / "cleaned", [folder / "evaluation.jsonl"])
        seconds = time.perf_counter() - began
        found = [json.loads(row.content) for row in read_rows(folder / "cleaned" / "leaks.jsonl")]
    leaks = {int(leak["place"].rpartition(":")[2]) - 1: leak for leak in found}
    print(f"{len(questions):,} distinct real questions: {dict(Counter(source for source, _ in questions))}")
    print(f"{len(tests):,} of them the evaluation set, in {seconds:.1f} s; {made['counts']}")
    report(asked, leaks, [text for _, text in tests])


def real_questions() -> Iterator[tuple[str, str]]:
    """(source, question)."""
    for row in read_rows(REAL / "short_gsm8k_train.jsonl"):
        yield "gsm8k", json.loads(row.content)["prompt"]
    for row in read_rows(REAL / "long_planbench_r1.jsonl.gz"):
        yield "planbench", json.loads(row.content)["prompt"]
    for row in read_rows(REAL / "chat_glaive_toolcall.jsonl"):
        for message in json.loads(row.content)["messages"]:
            if message["role"] == "user":
                yield "chats", message["content"]


def plant(source: str, text: str, number: int) -> tuple[str, str, str]:
    """(source, the name of the change, the changed question); a short question must stay whole."""
    names = [*CHANGES] if len(text.split()) >= LONG_ENOUGH else [*CHANGES][:3]
    name = names[number % len(names)]
    return source, name, CHANGES[name](text)


def write(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"question": text, "answer": "0"}) + "\n" for text in texts), encoding="utf-8")


def report(asked: list[tuple[str, str, str]], leaks: dict[int, dict], tests: list[str]) -> None:
    for name in CHANGES:
        numbers = [number for number, (_, change, _) in enumerate(asked) if change == name]
        print(f"planted, {name}: {sum(number in leaks for number in numbers)} of {len(numbers)} found")
    beside = [number for number in leaks if not asked[number][1]]
    plain = [" ".join(plain_words(text)) for text in tests]
    true = [number for number in beside if overlaps(asked[number][2], plain)]
    print(f"beside them {len(beside)} flagged, {dict(Counter(asked[number][0] for number in beside))}, "
          f"of which {len(true)} share 13 words by brute force")  # fmt: skip
    print(f"precision {(len(leaks) - len(beside) + len(true)) / len(leaks):.4f}")
    for number in beside[:40]:
        print(f"\n{asked[number][0]}: {leaks[number]['words']} words: {leaks[number]['text'][:300]!r}")


def plain_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def overlaps(text: str, tests: list[str]) -> bool:
    words = plain_words(text)
    runs = [f" {' '.join(words[at : at + 13])} " for at in range(len(words) - 12)]
    return any(" ".join(words) == test or any(run in f" {test} " for run in runs) for test in tests)


if __name__ == "__main__":
    main()
