"""The model card (README.md) of an exported model: description, usage, training, verification, what to add by hand."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from rsft_lib.common.artifact import MANIFEST, file_hash
from rsft_lib.common.paths import resolve
from rsft_lib.tokenizer.dialect import MODES, Dialect, dialect_of

CARD = """---
library_name: transformers
pipeline_tag: text-generation
base_model: {base}
---

# {name}

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")
question = [{{"role": "user", "content": "What is 17 times 23?{switch}"}}]
prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True){mode}
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=512)[0]))
```

## Training

{training}

## Verification

{begin}
Not verified yet.
{end}

## To be written

The data, its licence and what was excluded from it; limitations; the licence of this model.
"""
BEGIN, END = "<!-- verification: begin, written by notebook 07 -->", "<!-- verification: end -->"
HYBRID = """A reasoning model that answers in two modes, fine-tuned from `{base}` on responses only. {usage}"""
BY_TOKEN = """The first token of
an answer is its mode: {modes}. The model chooses the mode itself; append a token to the prompt to set it."""
BY_SWITCH = """End the
user's message with {switches}: the answer begins with a chain of thought between `<think>` and `</think>`, or with an
empty think block. {block}"""
BLOCK = {  # by whether it is masked
    False: "The model writes the block itself; `enable_thinking=False` has the chat template write it into the prompt.",
    True: "The block was not trained: for short answers set `enable_thinking=False`, which writes it into the prompt.",
}
PLAIN = "A model fine-tuned from `{base}` on responses only."
OMITTED = ("checkpoint", "data", "eval_data", "eval_more", "eval_questions", "output")  # paths


def model_card(name: str, checkpoint: Path, weights: dict) -> str:
    """The card's text.

    Args:
        weights: facts of the weights to list: name -> value.
    """
    manifest = _manifest(checkpoint)
    settings = {key: value for key, value in manifest.get("config", {}).items() if key not in OMITTED}
    data = manifest.get("data", {}).get("manifest_sha256")
    facts = {"steps": manifest.get("iteration"), **settings, "data_sha256": data, **weights}
    training = markdown_table(("", ""), [item for item in facts.items() if item[1] not in (None, "")])
    hybrid, base = _knows_modes(manifest), base_model(checkpoint) or "not recorded"
    dialect = dialect_of(data_options(manifest))
    switch, given = (dialect.forms["short"].switch, dialect.opening("short")) if hybrid else ("", "")
    return CARD.format(
        name=name, base=base, training=training,
        what=(HYBRID if hybrid else PLAIN).format(base=base, usage=_usage(dialect)), switch=switch,
        mode=f" + {json.dumps(given)}" if given else "", begin=BEGIN, end=END,
    )  # fmt: skip


def with_verification(card: str, text: str) -> str:
    """The card with `text` between the two marks; unchanged if somebody removed them."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{text}\n{end}{after}" if begin and end else card


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def data_options(manifest: dict) -> dict:
    """The options with which the data of a training checkpoint was tokenized; empty if unknown."""
    return manifest.get("data", {}).get("options", {})


def _usage(dialect: Dialect) -> str:
    """How a prompt asks for a mode."""
    switches = " or ".join(f"`{form.switch.strip()}`" for form in dialect.forms.values() if form.switch)
    if switches:
        return BY_SWITCH.format(switches=switches, block=BLOCK[dialect.masked])
    return BY_TOKEN.format(modes=" or ".join(f"`{form.opening}`" for form in dialect.forms.values()))


def _knows_modes(manifest: dict) -> bool:
    """Whether the model was trained on answers that begin with a control token; True if unknown."""
    path = resolve(manifest.get("config", {}).get("data", "")) / MANIFEST
    if not path.is_file() or file_hash(path) != manifest.get("data", {}).get("manifest_sha256"):
        return True  # the training data is gone or has changed
    modes = json.loads(path.read_text(encoding="utf-8")).get("modes")
    return modes is None or any(mode in modes for mode in MODES)


def base_model(folder: Path) -> str:
    """The Hub name of the model that a folder was made from, or that model's folder name; '' if unknown."""
    manifest = _manifest(folder)
    if "name" in manifest:  # downloaded
        return manifest["name"]
    before = manifest.get("source") or manifest.get("config", {}).get("checkpoint")
    if not before:
        return Path(folder).name if manifest.get("made_by") != "train" else ""
    return base_model(Path(before)) if Path(before).is_dir() else Path(before).name


def _manifest(folder: Path) -> dict:
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
