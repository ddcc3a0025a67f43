"""Supervised fine-tuning of reasoning models into hybrid ones, on megatron-core."""

import logging
import os
import sys
import warnings
from types import ModuleType

# What megatron-core is told, or tells, several times a rank, and no reader of a log can act upon: what it goes on
# without, older names of torch's functions, the gradients of its optimizer's shards, which are views, barriers that
# are not told which GPU is this rank's, and that cuBLAS was called on one of torch's threads for the first time.
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
for _module in (  # of what later versions may lack, and of an MLP that is not megatron-core's own
    "models.gpt.gpt_model", "distributed.distributed_data_parallel", "dist_checkpointing.strategies.torch",
    "transformer.transformer_layer",
):  # fmt: skip
    logging.getLogger(f"megatron.core.{_module}").setLevel(logging.ERROR)

# When megatron-core is imported it hands functions to torch.compile, and torch imports its compilers: a quarter of the
# time that a rank or a notebook takes to start. Without a GPU none of these functions is called.
HAS_GPU = any(map(os.path.exists, ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")))  # the last is under WSL
if not HAS_GPU:  # then a CUDA toolkit is of no use; torch says so in every notebook that imports megatron-core
    logging.getLogger("torch.utils.cpp_extension").addFilter(
        lambda record: "No CUDA runtime" not in record.getMessage()
    )
if not HAS_GPU and "megatron.core.jit" not in sys.modules:
    _jit = sys.modules["megatron.core.jit"] = ModuleType("megatron.core.jit")
    _jit.jit_fuser = _jit.noop_decorator = lambda function: function
    _jit.enable_jit_fuser = _jit.disable_jit_fuser = lambda: None
