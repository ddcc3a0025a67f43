"""Megatron-LM's older checkpoint layout, one `torch.save`d file per rank, as used by the original of this kit.

    ..._Megatron_TP2PP1/latest_checkpointed_iteration.txt
    ..._Megatron_TP2PP1/iter_0000001/mp_rank_00/model_optim_rng.pt      (mp_rank_00_000 with pipeline stages)

Each file holds `{"model": {name: tensor}, "iteration": ..., "checkpoint_version": 3.0}`. Names are those of the
Transformer Engine layers, numbered from 0 on every pipeline stage; each rank has its shard along `split_axis`. See
megatron/training/checkpointing.py of https://github.com/NVIDIA/Megatron-LM. `args`, a class instance there, is
omitted, so that the file loads with `weights_only=True`; Megatron-LM then uses its own arguments.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rsft_lib.checkpoint.lazy_weights import Box, Piece, Weights, data_of, refusal, refuse
from rsft_lib.model.config import check_layout, padded_vocab_size
from rsft_lib.model.weight_map import EMBEDDING, HEAD, expert_count, split_axis, weight_map

TRACKER, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
VOCAB_MULTIPLE = 128  # Megatron-LM's --make-vocab-size-divisible-by, times tensor parallel
FUSED = "mlp.linear_fc1.weight"  # gate and up projection; each rank has a shard of both
EXTRA_STATE = "_extra_state"  # of Transformer Engine's modules; None without FP8 state
MODULES_WITH_STATE = (
    "self_attention.core_attention", "self_attention.linear_proj", "self_attention.linear_qkv",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
LOCAL_NAMES = {  # of layers without Transformer Engine
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def rank_folder(tp_rank: int, pp_rank: int, pipeline_parallel: int) -> str:
    """`mp_rank_00`, or `mp_rank_00_000` where there are pipeline stages."""
    return f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pipeline_parallel > 1 else "")


def rows_of_vocabulary(vocab_size: int, tensor_parallel: int) -> int:
    """Number of embedding rows after Megatron-LM's padding."""
    return padded_vocab_size(vocab_size, VOCAB_MULTIPLE * tensor_parallel)


def refuse_experts(config: PretrainedConfig) -> None:
    """Raise ValueError for a model with experts, for which Megatron-LM's names depend on the expert-parallel size."""
    if expert_count(config):
        raise ValueError(
            f"format 'legacy' has no experts, and model_type is {config.model_type!r}: use format 'torch_dist', which "
            "Megatron-LM reads as well"
        )


class RankFile(NamedTuple):
    """Contents of one rank's file: local name -> global name, and local name -> boxes to concatenate by rows."""

    path: str
    names: dict[str, str]
    boxes: dict[str, list[Box]]


def plan(weights: Weights, config: PretrainedConfig, tensor_parallel: int, pipeline_parallel: int) -> list[RankFile]:
    """Plan the files of a checkpoint of `weights`, which have megatron-core names and a padded vocabulary.

    Raises:
        ValueError: the model cannot be partitioned across the ranks.
    """
    check_layout(config, tensor_parallel, pipeline_parallel)
    files = []
    for pp_rank in range(pipeline_parallel):
        names = _stage(config, pp_rank, pipeline_parallel)
        for tp_rank in range(tensor_parallel):
            path = f"iter_0000001/{rank_folder(tp_rank, pp_rank, pipeline_parallel)}/{FILE}"
            boxes = {ours: _boxes(weights, theirs, config, tp_rank, tensor_parallel) for ours, theirs in names.items()}
            files.append(RankFile(path, names, boxes))
    return files


def nbytes(weights: Weights, files: list[RankFile]) -> int:
    """Total bytes of the tensors in the files."""
    return sum(_allocated(weights.empty(f.names[ours]), boxes).nbytes for f in files for ours, boxes in f.boxes.items())


def write(
    folder: Path, weights: Weights, files: list[RankFile], progress: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Write the planned files into `folder`, with one block of one weight in memory at a time.

    Args:
        progress: called with the number of bytes of every written block.
    """
    for file in files:
        (folder / file.path).parent.mkdir(parents=True)
        _write_rank(folder / file.path, weights, file.names, file.boxes, progress)
    (folder / TRACKER).write_text("1")


def _stage(config: PretrainedConfig, pp_rank: int, pipeline_parallel: int) -> dict[str, str]:
    """Local name in the files of a pipeline stage -> global name."""
    first, last = pp_rank == 0, pp_rank == pipeline_parallel - 1
    per_stage = config.num_hidden_layers // pipeline_parallel
    names = {EMBEDDING: EMBEDDING} if first else {}
    for name in weight_map(config):
        if (match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name)) and int(match[1]) // per_stage == pp_rank:
            names[f"decoder.layers.{int(match[1]) % per_stage}.{match[2]}"] = name
    if last:
        names["decoder.final_layernorm.weight"] = "decoder.final_layernorm.weight"
    if last and not (first and config.tie_word_embeddings):
        names[HEAD] = EMBEDDING if config.tie_word_embeddings else HEAD
    return names


def _boxes(weights: Weights, name: str, config: PretrainedConfig, tp_rank: int, tensor_parallel: int) -> list[Box]:
    """The parts of a weight on one tensor-parallel rank, to concatenate by rows."""
    shape, axis = weights.empty(name).shape, split_axis(name, config)
    box = [slice(0, size) for size in shape]
    if axis is None:
        return [tuple(box)]
    halves = 2 if name.endswith(FUSED) else 1
    assert shape[axis] % (halves * tensor_parallel) == 0, f"{name} {tuple(shape)}: check_layout should have refused it"
    part, boxes = shape[axis] // halves // tensor_parallel, []
    for half in range(halves):
        start = half * shape[axis] // halves + tp_rank * part
        box[axis] = slice(start, start + part)
        boxes.append(tuple(box))
    return boxes


def _write_rank(path: Path, weights: Weights, names: dict, boxes: dict[str, list[Box]], progress: Callable) -> None:
    """Have torch write the file with gaps for the tensors, then fill them block by block."""
    state = {ours: _allocated(weights.empty(names[ours]), boxes[ours]) for ours in names}
    layers = sorted({name.split(".")[2] for name in names if name.startswith("decoder.layers.")}, key=int)
    modules = [f"decoder.layers.{layer}.{module}" for layer in layers for module in MODULES_WITH_STATE]
    modules += ["output_layer"] * ("decoder.final_layernorm.weight" in names)
    state |= {f"{module}.{EXTRA_STATE}": None for module in modules}
    with torch.serialization.skip_data():
        torch.save({"model": state, "iteration": 1, "checkpoint_version": 3.0}, path)
    places = torch.load(path, map_location="meta", weights_only=True)["model"]
    with path.open("r+b") as file:
        for ours, theirs in names.items():
            file.seek(places[ours].untyped_storage()._checkpoint_offset)
            for box in boxes[ours]:
                for block in weights.blocks(theirs, box):
                    progress(file.write(data_of(block)))


def _allocated(empty: Tensor, boxes: list[Box]) -> Tensor:
    """An uninitialized tensor for all boxes, concatenated by rows; its memory is never touched."""
    heights, *widths = zip(*([s.stop - s.start for s in box] for box in boxes), strict=True)
    return torch.empty(sum(heights), *(width[0] for width in widths), dtype=empty.dtype)


def iteration_folder(folder: Path) -> Path | None:
    """The folder with the rank files: `folder` itself or the one that its tracker refers to; None if there is none.

    Raises:
        ValueError: the tracker refers to a folder without such files.
    """
    folder, tracker = Path(folder), Path(folder) / TRACKER
    if not tracker.is_file():
        return folder if any(folder.glob(f"mp_rank_*/{FILE}")) else None
    name = tracker.read_text(errors="replace").strip()
    named = folder / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
    if not any(named.glob(f"mp_rank_*/{FILE}")):
        raise ValueError(f"{tracker} contains {name!r}, but {named} has no mp_rank_*/{FILE}")
    return named


def open_weights(folder: Path, config: PretrainedConfig) -> Weights:
    """The weights of a checkpoint at any parallel size by megatron-core names, memory-mapped, without optimizer state.

    Raises:
        FileNotFoundError: the file of a rank is missing.
        ValueError: a file is damaged or unsafe, or the files are of different steps.
    """
    iteration = iteration_folder(folder)
    if iteration is None:
        raise FileNotFoundError(f"{folder} has no mp_rank_*/{FILE}")
    ranks = {path: _rank(path.name) for path in iteration.glob("mp_rank_*")}
    tensor_parallel, pipeline_parallel = (max(rank) + 1 for rank in zip(*ranks.values(), strict=True))
    refuse_experts(config)
    check_layout(config, tensor_parallel, pipeline_parallel)
    pieces: dict[str, list[Piece]] = {}
    steps = {}
    for pp_rank in range(pipeline_parallel):
        for tp_rank in range(tensor_parallel):
            path = iteration / rank_folder(tp_rank, pp_rank, pipeline_parallel) / FILE
            state = _load(path)
            steps[path] = state.get("iteration")
            for name, tensor in _global_names(state["model"], path, config, pp_rank, pipeline_parallel):
                _add(pieces, name, tensor, config, tp_rank, path)
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{path.parent.name}: {step}" for path, step in steps.items())
        raise ValueError(f"{iteration} mixes files of several steps: {listed}")
    return Weights(pieces)


def _rank(name: str) -> tuple[int, int]:
    match = re.fullmatch(r"mp_rank_(\d{2})(?:_(\d{3}))?", name)
    if not match:
        raise ValueError(f"{name}: expected mp_rank_XX or mp_rank_XX_YYY; checkpoints with experts cannot be read")
    return int(match[1]), int(match[2] or 0)


def _load(path: Path) -> dict:
    """Load one file with memory-mapped tensors and stubs for Megatron-LM's own classes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is incomplete")
    try:
        own = [
            name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name.startswith("megatron.")
        ]
        with torch.serialization.safe_globals([(type("Inert", (_Inert,), {}), name) for name in own]):
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(state["model"], dict):
            raise TypeError(f"its model is a {type(state['model']).__name__}")
    except Exception as error:  # of zip or pickle, or a dict with other keys
        raise ValueError(f"{path} is not a complete, safe checkpoint of one rank: {refusal(error)}") from None
    return state


class _Inert:
    """Stub for a class of Megatron-LM in a checkpoint."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass


def _global_names(
    state: dict, path: Path, config: PretrainedConfig, pp_rank: int, pipeline_parallel: int
) -> Iterator[tuple[str, Tensor]]:
    expected = _stage(config, pp_rank, pipeline_parallel)
    local = {ours.replace(te, plain): ours for plain, te in LOCAL_NAMES.items() for ours in expected if te in ours}
    state = {local.get(name, name): tensor for name, tensor in state.items() if not name.endswith(EXTRA_STATE)}
    problems = [f"{name}: not described by config.json" for name in sorted(state.keys() - expected.keys())]
    problems += [f"{name}: missing" for name in sorted(expected.keys() - state.keys())]
    refuse(problems, f"tensors of {path} do not match config.json")
    for name, tensor in state.items():
        if not (name == HEAD and config.tie_word_embeddings):  # the last stage's copy of the embedding
            yield expected[name], tensor


def _add(
    pieces: dict[str, list[Piece]], name: str, tensor: Tensor, config: PretrainedConfig, tp_rank: int, path: Path
) -> None:
    """Add a rank's shard to the pieces of a weight."""
    axis, known = split_axis(name, config), pieces.setdefault(name, [])
    if axis is None:
        if not known:
            known.append(Piece((0,) * tensor.ndim, tensor))
        elif not torch.equal(known[0].tensor, tensor):
            raise ValueError(f"{path}: {name} differs from the files of other ranks; are they of the same step?")
        return
    halves = tensor.chunk(2, dim=axis) if name.endswith(FUSED) else [tensor]
    for half, share in enumerate(halves):
        offset = [0] * tensor.ndim
        offset[axis] = half * (config.intermediate_size) + tp_rank * share.shape[axis]
        known.append(Piece(tuple(offset), share))
