"""Attention by cuDNN, asked for directly: graphs of the size that a pack needs.

Transformer Engine runs the same kernels, but on a graph for 32 samples as long as the whole pack; the blocks of those
that are not there start and end for nothing, which takes a tenth of the time. Here a graph is for the samples of a pack
and for the longest one rounded up; a run needs a few dozen of them, which take a tenth of a second each to make.
Graph API: https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html.
"""

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from rsft_lib.model.attention import Chunk, Packed, TEAttention

STEP = 512  # lengths are rounded up to a multiple of this
FEW = 8  # more samples than these are rounded up to a power of two
# Tensors of a graph; their places are the numbers that cuDNN knows them by.
NAMES = (
    "query", "key", "value", "output", "sums", "of_output", "of_query", "of_key", "of_value",
    "query_offsets", "key_offsets", "sum_offsets", "lengths",
)  # fmt: skip


class Shape(NamedTuple):
    """What a graph is made for."""

    samples: int
    longest: int
    tokens: int
    heads: int
    groups: int
    width: int
    deterministic: bool
    device: int


class CudnnAttention(TEAttention):
    """cuDNN's attention without Transformer Engine between, but where tokens are split over ranks."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, samples: Packed) -> Tensor:
        if self.parallel > 1 or query.shape[2] > 128 or query.shape[2] % 8:
            return super().forward(query, key, value, samples)
        shape = _shape(query, key, samples.chunks[0])
        if shape not in samples.worked_out:
            samples.worked_out[shape] = _places(samples.chunks[0], shape)
        return _Attention.apply(query, key, value, samples.worked_out[shape], shape).flatten(1)


class _Attention(Function):
    @staticmethod
    def forward(ctx, query, key, value, places, shape):
        inputs = {"query": query.contiguous(), "key": key.contiguous(), "value": value.contiguous()}
        outputs = {
            "output": torch.empty_like(query),
            "sums": query.new_empty(shape.tokens, shape.heads, dtype=torch.float32),
        }
        _run(_forward_graph(shape), inputs | outputs | places, shape)
        ctx.save_for_backward(*inputs.values(), *outputs.values())
        ctx.places, ctx.shape = places, shape
        return outputs["output"]

    @staticmethod
    def backward(ctx, grad):
        known = dict(zip(NAMES, ctx.saved_tensors, strict=False))
        found = {f"of_{name}": torch.empty_like(known[name]) for name in ("query", "key", "value")}
        _run(_backward_graph(ctx.shape), known | found | {"of_output": grad.contiguous()} | ctx.places, ctx.shape)
        return *found.values(), None, None


def _shape(query: Tensor, key: Tensor, chunk: Chunk) -> Shape:
    tokens, heads, width = query.shape
    count = len(chunk.query_ends) - 1
    samples = count if count <= FEW else 1 << (count - 1).bit_length()
    longest = min(tokens, -(-chunk.longest[0] // STEP) * STEP)
    deterministic = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0"  # Transformer Engine's switch
    return Shape(samples, longest, tokens, heads, key.shape[1], width, deterministic, query.device.index)


def _places(chunk: Chunk, shape: Shape) -> dict[str, Tensor]:
    """Where samples begin, in numbers of each tensor, and how long they are; missing ones have no length. int32."""
    missing = shape.samples + 1 - len(chunk.query_ends)
    ends = torch.nn.functional.pad(chunk.query_ends, (0, missing), value=shape.tokens)
    return {
        "query_offsets": ends * (shape.heads * shape.width),
        "key_offsets": ends * (shape.groups * shape.width),
        "sum_offsets": ends * shape.heads,
        "lengths": ends.diff(),
    }


def _run(graph, tensors: dict[str, Tensor], shape: Shape) -> None:
    import cudnn

    handle = _handle(shape.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")
    graph.execute({NAMES.index(name): x.data_ptr() for name, x in tensors.items()}, workspace, handle=handle)


@functools.cache
def _handle(device: int):
    import cudnn

    return cudnn.create_handle()


@functools.cache
def _forward_graph(shape: Shape):
    import cudnn

    graph, tensor, places = _begin(shape)
    output, sums = graph.sdpa(
        name="attention", q=tensor("query"), k=tensor("key"), v=tensor("value"),
        generate_stats=True, attn_scale=shape.width**-0.5, use_causal_mask=True, **_masked(places),
    )  # fmt: skip
    _output(output, "output", shape.heads, shape, places)
    sums.set_output(True).set_uid(NAMES.index("sums")).set_ragged_offset(places["sum_offsets"])
    sums.set_dim((shape.samples, shape.heads, shape.longest, 1))
    sums.set_stride((shape.longest * shape.heads, 1, shape.heads, 1)).set_data_type(cudnn.data_type.FLOAT)
    return _built(graph, shape)


@functools.cache
def _backward_graph(shape: Shape):
    import cudnn

    graph, tensor, places = _begin(shape)
    sums = graph.tensor(
        dim=(shape.samples, shape.heads, shape.longest, 1), stride=(shape.longest * shape.heads, 1, shape.heads, 1),
        data_type=cudnn.data_type.FLOAT, uid=NAMES.index("sums"), ragged_offset=places["sum_offsets"],
    )  # fmt: skip
    # What it sums up in float32 has a place for every sample's longest, or for every token if told how many there are.
    tokens = shape.tokens if shape.samples * shape.longest > 2 * shape.tokens else None
    gradients = graph.sdpa_backward(
        name="gradient", q=tensor("query"), k=tensor("key"), v=tensor("value"), o=tensor("output"),
        dO=tensor("of_output"), stats=sums, attn_scale=shape.width**-0.5, use_causal_mask=True, **_masked(places),
        max_total_seq_len_q=tokens, max_total_seq_len_kv=tokens,
        use_deterministic_algorithm=shape.deterministic,
    )  # fmt: skip
    for gradient, name in zip(gradients, ("of_query", "of_key", "of_value"), strict=True):
        _output(gradient, name, shape.heads if name == "of_query" else shape.groups, shape, places)
    return _built(graph, shape)


def _begin(shape: Shape) -> tuple:
    """(a graph, a function that makes one of its inputs by name, the inputs that say where samples are)"""
    import cudnn

    graph = cudnn.pygraph(
        io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT, handle=_handle(shape.device),
    )  # fmt: skip

    def numbers(name: str):
        count = shape.samples + (name != "lengths")
        return graph.tensor(
            dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=cudnn.data_type.INT32, uid=NAMES.index(name)
        )

    places = {name: numbers(name) for name in NAMES[9:]}

    def tensor(name: str):
        heads = shape.groups if name in ("key", "value") else shape.heads
        dim, stride = _layout(heads, shape)
        return graph.tensor(
            dim=dim, stride=stride, data_type=cudnn.data_type.BFLOAT16, uid=NAMES.index(name),
            ragged_offset=_offsets(heads, shape, places),
        )  # fmt: skip

    return graph, tensor, places


def _layout(heads: int, shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and steps of [samples, heads, longest, width] that lies in memory as [tokens, heads, width]."""
    sizes = shape.samples, heads, shape.longest, shape.width
    return sizes, (shape.longest * heads * shape.width, shape.width, heads * shape.width, 1)


def _offsets(heads: int, shape: Shape, places: dict):
    return places["query_offsets" if heads == shape.heads else "key_offsets"]


def _masked(places: dict) -> dict:
    return {"use_padding_mask": True, "seq_len_q": places["lengths"], "seq_len_kv": places["lengths"]}


def _output(tensor, name: str, heads: int, shape: Shape, places: dict) -> None:
    dim, stride = _layout(heads, shape)
    tensor.set_output(True).set_uid(NAMES.index(name)).set_dim(dim).set_stride(stride)
    tensor.set_ragged_offset(_offsets(heads, shape, places))


def _built(graph, shape: Shape):
    import cudnn

    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans(cudnn.build_plan_policy.HEURISTICS_CHOICE)
    return graph
