"""The files of a tokenizer folder, and the edits of a patch to each: renamed and new tokens, flags, EOS."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ADDED, SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"

# AutoTokenizer reads the model type from config.json; generation_config.json has the EOS id.
FILES = [
    TOKENIZER, CONFIG, TEMPLATE, SPECIAL_MAP, ADDED, "vocab.json", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "config.json", "generation_config.json",
]  # fmt: skip

# Keys under which tokenizer files list special tokens other than BOS, EOS and padding. Control tokens are not special.
SPECIAL_LISTS = {"additional_special_tokens", "extra_special_tokens"}
FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Edits:
    """The edits of one patch.

    `replacements`: old token -> new token. `new`: added token -> id. `plain`: tokens whose special flags are cleared.
    `eos`: the token that ends an answer and its id; None leaves EOS as it is.
    """

    replacements: dict[str, str]
    new: dict[str, int]
    plain: frozenset[str]
    eos: tuple[str, int] | None = None

    def copy(self, path: Path, target: Path) -> None:
        """Copy a file with the edits; byte for byte if none concerns it.

        Raises:
            ValueError: the file cannot be edited and contains a token to replace.
        """
        if path.suffix == ".json":
            content = read(path)
            edited = self.of(path.name, content)
            if path.name == CONFIG and _is_llama(content):
                edited["tokenizer_class"] = "PreTrainedTokenizerFast"
            if edited != content:
                write(target, path, edited)
                return
        if path.suffix == ".model" and any(old.encode() in path.read_bytes() for old in self.replacements):
            raise ValueError(
                f"{path} has one of {list(self.replacements)} in a sentencepiece vocabulary, which cannot be edited; "
                "choose another token, or copy the folder without this file: tokenizer.json has the same vocabulary"
            )
        shutil.copyfile(path, target)

    def of(self, name: str, content: dict) -> dict:
        """The edited content of a JSON file."""
        content = self._renamed(content)
        entries = {token: {"content": token} | self._flags(token) for token in self.new}
        if name == TOKENIZER:
            listed = [{"id": self.new[token]} | entry for token, entry in entries.items()]
            content = content | {"added_tokens": [*content["added_tokens"], *listed]}
        if name == CONFIG and "added_tokens_decoder" in content:
            numbered = {str(self.new[token]): entry for token, entry in entries.items()}
            content = content | {"added_tokens_decoder": content["added_tokens_decoder"] | numbered}
        if name == ADDED:
            content = content | self.new
        return _with_eos(name, content, *self.eos) if self.eos else content

    def _flags(self, token: str) -> dict[str, bool]:
        """A new token is special only if it is EOS: servers must not drop control tokens."""
        return dict.fromkeys(FLAGS, False) | {"special": bool(self.eos and token == self.eos[0])}

    def _renamed(self, node, key: str = ""):
        """`node` with tokens renamed where one is a complete key or value, and special flags cleared.

        `merges` are skipped: added tokens are not built from merges.
        """
        if isinstance(node, str):
            return self.replacements.get(node, node)
        if key == "merges" or not isinstance(node, list | dict):
            return node
        if isinstance(node, list):
            kept = [item for item in node if key not in SPECIAL_LISTS or not self._is_plain(item)]
            return [self._renamed(item) for item in kept]
        renamed = {self.replacements.get(k, k): self._renamed(v, k) for k, v in node.items()}
        if "special" in node and renamed.get("content") in self.plain:
            renamed |= {flag: False for flag in ("special", "lstrip", "rstrip", "single_word") if flag in node}
        return renamed

    def _is_plain(self, item) -> bool:
        token = item.get("content") if isinstance(item, dict) else item
        return token in self.plain or token in self.replacements


def _with_eos(name: str, content: dict, token: str, number: int) -> dict:
    """The content of a file with another EOS, where it names one; a list of ids keeps its others."""
    if name in (CONFIG, SPECIAL_MAP) and (before := content.get("eos_token")):
        eos = before | {"content": token} if isinstance(before, dict) else token
        return content | {"eos_token": eos}
    before = content.get("eos_token_id")
    if name not in ("config.json", "generation_config.json") or before is None:
        return content
    others = before if isinstance(before, list) else [before]
    if number in others:
        return content
    # A base model's own end of text still ends a generation.
    return content | {"eos_token_id": number if name == "config.json" else [number, *others]}


def _is_llama(config: dict) -> bool:
    """Whether `tokenizer_class` names Llama's tokenizer, which transformers 5 rebuilds in its own way.

    R1's byte-level tokenizer would lose its spaces, and TinyLlama's would read a space at the start of a text otherwise
    than `tokenizer.json`. https://github.com/huggingface/transformers/issues/45488
    """
    return str(config.get("tokenizer_class")).startswith("LlamaTokenizer")


def write_template(folder: Path, template: str) -> None:
    """Write the template where the folder keeps it: in the config, or in its own file (transformers 4.54 and later)."""
    config = read(folder / CONFIG)
    if "chat_template" in config:
        write(folder / CONFIG, folder / CONFIG, config | {"chat_template": template})
    if "chat_template" not in config or (folder / TEMPLATE).is_file():
        (folder / TEMPLATE).write_text(template, encoding="utf-8")


def read(path: Path):
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, source: Path, content: dict) -> None:
    """Write JSON as transformers and tokenizers do, so that a file differs from `source` only in its edits."""
    end = "\n" if source.read_text(encoding="utf-8").endswith("\n") else ""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + end, encoding="utf-8")
