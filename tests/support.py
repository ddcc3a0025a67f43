"""Small models, stores and runs that several tests share."""

import random
import zipfile
from io import BytesIO
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rsft_lib.checkpoint import verify
from rsft_lib.checkpoint.convert import differing
from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.common.artifact import new_folder
from rsft_lib.data.conversation import conversation
from rsft_lib.data.store import StoreWriter
from rsft_lib.launch import launch_training
from rsft_lib.model.config import read_config
from rsft_lib.model.weight_map import row_map
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.metrics import read_metrics

VOCAB = 256
TESTS = Path(__file__).parent
ROOT = TESTS.parent
"""The folder of what tests share: the PYTHONPATH of processes that they start."""


def tiny_model(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Qwen2ForCausalLM:
    """A Qwen2 of four layers in `folder`; noise on every weight, so that norms and biases do something."""
    shape = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **changes})).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def random_store(folder: Path, samples: int = 60, longest: int = 60, seed: int = 0, facts: dict | None = None) -> Path:
    """Samples of random tokens, the latter part of each trained; `facts` for the manifest."""
    rng = random.Random(seed)
    with new_folder(folder, {"made_by": "tokenize", **(facts or {})}) as temporary:
        writer = StoreWriter(temporary)
        for _ in range(samples):
            length = rng.randint(6, longest)
            prompt = rng.randint(2, length - 2)
            writer.add([rng.randrange(VOCAB) for _ in range(length)], [0] * prompt + [1] * (length - prompt))
        writer.close()
    return folder


def settings(**changes) -> TrainConfig:
    """Settings of a short run in fp32."""
    short = {"seq_length": 96, "global_batch_size": 4, "lr": 1e-3, "precision": "fp32", "log_interval": 1}
    return TrainConfig(**{**short, **changes})


def trained(config: TrainConfig, nproc: int = 1) -> list[dict]:
    """Run a training to its end and return its metrics."""
    launch_training(config, nproc)
    return read_metrics(Path(config.output))


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, those of the optimizer too."""
    weights = torch_dist.open_weights(checkpoint)
    return {name: weights.read(name).clone() for name in weights}


def differing_tensors(model: Path, checkpoint: Path) -> list[str]:
    """Names of the Hugging Face tensors that the checkpoint does not give back bit for bit."""
    weights, others, _ = verify._both(model, checkpoint)
    return differing(weights, others)


def logit_difference(model: Path, checkpoint: Path, tokens: int = 64) -> float:
    """Largest absolute difference of the logits of transformers and megatron-core, in fp32, on random tokens."""
    ids = torch.randint(read_config(model).vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    expected = verify.with_transformers(model, lambda logits: logits(ids))
    found = verify.with_megatron(model, checkpoint, tokens, lambda logits: logits(ids))
    return (found - expected).abs().max().item()


def by_hf_name(named: dict[str, torch.Tensor], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors by megatron-core name -> the rows of each Hugging Face tensor."""
    parts = {}
    for ours, origins in row_map(config).items():
        for rows in origins:
            parts.setdefault(rows.name, []).append(rows.of(named[ours]))
    return {name: torch.cat(found) for name, found in parts.items()}


def record_checksums(checkpoint: Path) -> set[int]:
    """The CRC-32s that stand in a checkpoint's tensors, each a zip file of its own; 0 where none was computed."""
    found = set()
    for place in torch_dist.read_metadata(checkpoint).storage_data.values():
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            found |= {record.CRC for record in zipfile.ZipFile(BytesIO(file.read(place.length))).infolist()}
    return found


def tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words, with a template, in `folder`."""
    words = ["<unk>", "<s>", "</s>", "one", "two", "three"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<unk>")),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template="{{ bos_token }}",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def to_messages(record: dict, place: str) -> list[dict]:
    """The messages of a record; errors begin with `place`."""
    try:
        return conversation(record).messages
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
