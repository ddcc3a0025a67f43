"""Supervised fine-tuning of reasoning models into hybrid ones, on megatron-core.

In the order in which they are used:

    model_folder      a Hugging Face model by folder or Hub name
    patch_tokenizer   the vocabulary gets `<short>`; the chat template becomes one for training
    load_tokenizer    a tokenizer folder, without running code of it
    convert           Hugging Face weights -> a `torch_dist` checkpoint of megatron-core
    build_hybrid      long and short answers to the same problems -> train.jsonl and heldout.jsonl
    tokenize          a dataset -> tokens and loss mask on disk
    TokenStore        these, sample by sample
    TrainConfig       every setting of a training
    train             train or resume on `nproc` ranks of this machine
    read_metrics      the metrics of a run folder
    export            a run -> a Hugging Face folder
    generate          answers of an exported model with thoughts, short, or as it chooses

Relative paths start at the working directory. The notebooks are these calls with words and pictures between them.
"""

import importlib
import logging
import os
import sys
import warnings
from importlib.metadata import version
from types import ModuleType

_HOMES = {  # public name -> where it is defined
    "model_folder": "checkpoint.hub.model_folder",
    "patch_tokenizer": "tokenizer.patch.patch_tokenizer",
    "load_tokenizer": "tokenizer.patch.load_tokenizer",
    "convert": "checkpoint.convert.convert",
    "build_hybrid": "data.hybrid.build_hybrid",
    "tokenize": "data.tokenize.tokenize",
    "TokenStore": "data.store.TokenStore",
    "TrainConfig": "training.config.TrainConfig",
    "train": "launch.training.launch_training",
    "read_metrics": "training.metrics.read_metrics",
    "export": "checkpoint.export.export",
    "generate": "generation.generate.generate",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Import a public name when it is first used: torch and transformers take seconds."""
    if name == "__version__":
        value = version("rsft-lib")
    elif name in _HOMES:
        module, _, attribute = _HOMES[name].rpartition(".")
        value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


# Warnings that megatron-core and torch repeat on every rank and that a user cannot act upon: optional packages, renamed
# functions of torch, gradients of the optimizer's shards (views), barriers without a device, cuBLAS on a new thread.
for _message in (
    ".*(Transformer Engine|Apex|full scope is deprecated)",
    "`torch.distributed.* is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    r"barrier\(\): using the device under current context",
    "Attempting to run cuBLAS, but there was no current CUDA context",
    "MimoModelConfig is experimental",
    "absl.logging is not installed",
    "Could not determine rank from",
):
    warnings.filterwarnings("ignore", message=_message)
for _module in (  # loggers: missing features of later versions, and an MLP that is not megatron-core's
    "models.gpt.gpt_model", "distributed.distributed_data_parallel", "dist_checkpointing.strategies.torch",
    "transformer.transformer_layer",
):  # fmt: skip
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)

# On import, megatron-core passes functions to torch.compile, which makes torch import its compilers: a quarter of the
# start-up time of a rank. Without a GPU none of these functions is called.
HAS_GPU = any(map(os.path.exists, ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")))  # the last is under WSL
if not HAS_GPU:  # then a CUDA toolkit is of no use; torch says so in every process that imports megatron-core
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
if not HAS_GPU and "megatron.core.jit" not in sys.modules:
    _jit = sys.modules["megatron.core.jit"] = ModuleType("megatron.core.jit")
    vars(_jit).update(jit_fuser=lambda function: function, noop_decorator=lambda function: function)
    vars(_jit).update(enable_jit_fuser=lambda: None, disable_jit_fuser=lambda: None)
