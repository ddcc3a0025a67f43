"""A tiny demo model with random weights and R1's special tokens and chat template, and arithmetic problems."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rsft_lib.common.artifact import new_folder
from rsft_lib.common.paths import resolve
from rsft_lib.common.progress import without_bars
from rsft_lib.tokenizer.formats import R1_CHAT_TEMPLATE

MODEL, SOURCES = "assets/checkpoints/tiny", "assets/data/tiny"  # written by notebooks 01 and 03
TINY = {  # settings of training.config.TrainConfig for this model
    "seq_length": 512, "global_batch_size": 4, "lr": 2e-3, "min_lr": 2e-4, "precision": "fp32",
    "eval_interval": 50, "eval_iters": 4,
}  # fmt: skip

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = {  # as in DeepSeek-R1-Distill-Qwen: token -> whether it is special
    EOS: True, "<｜User｜>": False, "<｜Assistant｜>": False, BOS: True, "<|EOT|>": False,
    "<think>": False, "</think>": False, "<|quad_start|>": True, "<|quad_end|>": True,
}  # fmt: skip

# Pre-tokenization regex of Qwen2: https://huggingface.co/Qwen/Qwen2-0.5B, tokenizer.json
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

STEPS = {1: 0.7, 2: 0.1, 3: 0.1, 4: 0.1}  # steps of a problem -> share of such problems
MOST = 20_000
NAMES = ["Anna", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Hanna"]
THINGS = ["apples", "books", "coins", "eggs", "cards", "pens", "shells", "stamps"]
GAINS, LOSSES = ["buys", "finds", "gets"], ["loses", "sells", "gives away"]
# Number words, one token each, up to the largest number in any problem or intermediate step.
NUMBERS = "zero one two three four five six seven eight nine ten".split()


def make_model(folder: str | Path, seed: int) -> Path:
    """Write the tiny model to `folder`, in the layout of a model folder from the Hub.

    A `Qwen2ForCausalLM` with about two million fp32 parameters: 4 layers, 4 heads in 2 query groups, QKV biases, and
    untied embeddings with more rows than the tokenizer has tokens, as in the real model.
    """
    import torch  # these two take seconds, and most notebooks that import this module do not need them
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = resolve(folder)
    with new_folder(folder, {"made_by": "demo.make_model", "seed": seed}) as temporary:
        tokenizer = _train_tokenizer(text for p in problems(500, seed) for text in (p["problem"], p["think"]))
        tokenizer.save_pretrained(temporary)
        config = Qwen2Config(
            vocab_size=512,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(), without_bars():
            torch.manual_seed(seed)
            Qwen2ForCausalLM(config).save_pretrained(temporary)
    return folder


def make_sources(folder: str | Path, count: int, seed: int, short_up_to: int = max(STEPS)) -> Path:
    """Write `long.jsonl`, `count` problems with chain of thought, and `short.jsonl`, the same without.

    Args:
        short_up_to: maximum steps of the problems in `short.jsonl`.
    """
    folder, made = resolve(folder), list(problems(count, seed))
    facts = {"made_by": "demo.make_sources", "seed": seed, "problems": count, "short_up_to": short_up_to}
    with new_folder(folder, facts) as temporary:
        for name, field, most in (("long", "think", max(STEPS)), ("short", "short", short_up_to)):
            records = (
                {"instruction": p["problem"], "output": p[field], "answer": p["answer"], "difficulty": p["steps"]}
                for p in made if p["steps"] <= most
            )  # fmt: skip
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (temporary / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def problems(count: int, seed: int) -> Iterator[dict]:
    """Yield `count` word problems with `problem`, `think`, `short`, `answer`, all strings, and `steps`, 1 to 4.

    No two have the same text, and none with three or four steps the same sequence of numbers, so that a held-out one
    does not paraphrase a training problem. Of fewer steps there are too few sequences: those repeat with other names.

    >>> next(problems(1, seed=1))["think"]
    '<think>\\nStart: two. Now: two plus three is five.\\n</think>\\n\\nAnswer: five'

    Raises:
        ValueError: `count` exceeds 20,000; distinct problems would be hard to find.
    """
    if count > MOST:
        raise ValueError(f"{count} problems requested, but at most {MOST:,} are made")
    rng = random.Random(seed)
    seen: set[str | tuple[int, ...]] = set()
    while len(seen) < count:
        steps = rng.choices(*zip(*STEPS.items(), strict=True))[0]
        totals = _walk(rng, steps)
        problem = _problem(rng, totals) | {"steps": steps}
        known = totals if steps > 2 else problem["problem"]
        if known not in seen:
            seen.add(known)
            yield problem


def _walk(rng: random.Random, steps: int) -> tuple[int, ...]:
    """Totals within `NUMBERS` that change by one to nine with each step."""
    totals = [rng.randrange(1, len(NUMBERS))]
    for _ in range(steps):
        totals.append(rng.choice([total for total in range(len(NUMBERS)) if 0 < abs(total - totals[-1]) < 10]))
    return tuple(totals)


def _problem(rng: random.Random, totals: tuple[int, ...]) -> dict:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    sentences, steps = [f"{name} has {NUMBERS[totals[0]]} {thing}."], [f"Start: {NUMBERS[totals[0]]}."]
    for before, after in pairwise(totals):
        verb, sign = (rng.choice(GAINS), "plus") if after > before else (rng.choice(LOSSES), "minus")
        change = NUMBERS[abs(after - before)]
        sentences.append(f"{name} {verb} {change}.")
        steps.append(f"Now: {NUMBERS[before]} {sign} {change} is {NUMBERS[after]}.")
    answer = f"Answer: {NUMBERS[totals[-1]]}"
    return {
        "problem": " ".join([*sentences, f"How many {thing} now?"]),
        "think": f"<think>\n{' '.join(steps)}\n</think>\n\n{answer}",
        "short": answer,
        "answer": NUMBERS[totals[-1]],
    }


def _train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's pre-tokenization, which AutoTokenizer rebuilds from the model type."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in SPECIAL.items()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=None,  # explicit, since AutoTokenizer would add one by default
        chat_template=R1_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
