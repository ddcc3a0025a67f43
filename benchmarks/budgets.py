"""Does cutting traces teach a model to answer within a thinking budget? Accuracy against budget, by seed.

    PYTHONPATH=. python benchmarks/budgets.py FOLDER [SEEDS] [SHARE]

Trains the model of notebook 00 with whole thoughts and with a SHARE of them cut, from the same weights on the same
problems, and asks all held-out questions with thoughts: unforced, and forced shut at several budgets, also at half of
the median thought length.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, median, stdev

from rsft_lib import TrainConfig, build_hybrid, convert, demo, export, patch_tokenizer, tokenize, train
from rsft_lib.data.records import read_records
from rsft_lib.display.model.answers import wilson
from rsft_lib.generation.answer import count_correct
from rsft_lib.generation.generate import open_speaker
from rsft_lib.generation.inference_engines import Sampling
from rsft_lib.generation.questions import held_out_questions
from rsft_lib.tokenizer.dialect import END_THINK, THINK
from rsft_lib.tokenizer.patch import load_tokenizer

PROBLEMS, STEPS = 6000, 1000
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t of a mean of so many seeds, 95 %


def trained_model(folder: Path, seed: int, share: float) -> Path:
    """The exported model; what both models have in common is made once."""
    name = f"{share:g}"
    demo.make_model(folder / "model", seed)
    demo.make_sources(folder / "sources", PROBLEMS, seed, short_up_to=1)
    patch_tokenizer(folder / "model", folder / "tokenizer", {"<|quad_start|>": "<short>"})
    convert(folder / "model", folder / "megatron")
    long, short = (folder / "sources" / f"{kind}.jsonl" for kind in ("long", "short"))
    options = {"modes": "by_need", "tokenizer": folder / "tokenizer", "budget_share": share}
    built = build_hybrid(long, short, folder / f"hybrid-{name}", held_out=0.1, seed=seed, **options)
    tokenize(folder / f"hybrid-{name}" / "train.jsonl", folder / "tokenizer", folder / f"tokens-{name}", 513)
    config = TrainConfig(
        **demo.TINY | {"global_batch_size": 2}, checkpoint=str(folder / "megatron"), train_iters=STEPS, seed=seed,
        data=str(folder / f"tokens-{name}"), output=str(folder / f"run-{name}"),
    )  # fmt: skip
    train(config, nproc=2)
    export(folder / f"run-{name}", folder / "tokenizer", folder / f"exported-{name}")
    print(f"seed {seed}, share {share}: {built.get('thoughts_cut', 'whole')}", flush=True)
    return folder / f"exported-{name}"


def half_of_median(folder: Path) -> int:
    """Half of the median number of tokens between <think> and </think> in the held-out set."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = [record["output"] for _, record in read_records(folder / "hybrid-0" / "heldout.jsonl")]
    thoughts = [t.removeprefix(THINK).partition(END_THINK)[0] for t in texts if t.startswith(THINK)]
    return int(median(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in thoughts) // 2)


def accuracies(folder: Path, model: Path, budgets: list[int]) -> dict[str, float]:
    """Accuracy on the held-out questions, unforced and by budget."""
    questions = held_out_questions(folder / "hybrid-0" / "heldout.jsonl", PROBLEMS)
    expected, speaker, found = [question.expected for question in questions], open_speaker(model), {}
    for budget in (None, *budgets):
        answers = speaker.answers([(question, "think") for question in questions], Sampling(96, budget_tokens=budget))
        right, known = count_correct(answers, expected)
        found["unforced" if budget is None else str(budget)] = right / known
        low, high = wilson(right, known)
        print(f"  {model.name} {budget}: {right / known:.1%} of {known} ({low:.1%} to {high:.1%})", flush=True)
    return found


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{fmean(values):.3f} ± {T95[len(values)] * stdev(values) / len(values) ** 0.5:.3f}"


def main(folder: Path, seeds: int = 3, share: float = 0.1) -> None:
    rows = []
    for seed in range(1, seeds + 1):
        place = folder / f"seed-{seed}"
        models = [trained_model(place, seed, each) for each in (0, share)]
        half = half_of_median(place)
        budgets = [0, half // 2, half, 2 * half, 3 * half]
        rows.append([half, *(accuracies(place, model, budgets) for model in models)])
        (folder / "budgets.json").write_text(json.dumps(rows, indent=1))
    print(f"half of the median: {[half for half, *_ in rows]} tokens; means of {seeds} seeds with 95 % intervals")
    for what, pairs in (
        ("unforced", [(whole["unforced"], cut["unforced"]) for _, whole, cut in rows]),
        ("at half", [(whole[str(half)], cut[str(half)]) for half, whole, cut in rows]),
    ):
        means = [interval([pair[i] for pair in pairs]) for i in (0, 1)]
        gain, ratio = interval([b - a for a, b in pairs]), fmean(b for _, b in pairs) / fmean(a for a, _ in pairs)
        print(f"{what:<9} whole {means[0]}  cut {means[1]}  difference {gain}  ratio of the means {ratio:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(kind(value) for kind, value in zip((int, float), sys.argv[2:], strict=False)))
