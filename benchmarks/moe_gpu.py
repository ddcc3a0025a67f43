"""Training a mixture of experts on GPUs: this kit, plain megatron-core and transformers on the same packs; a floor.

    RSFT_REAL_DATA=FOLDER python benchmarks/moe_gpu.py --output OUT [--gpus 1] [--ep 1] [--layers 8] [--variants ...]

The model has the shape of Qwen3-30B-A3B with fewer layers and random weights; its router chooses freely. A micro-batch
is a pack of 16,384 tokens of real traces, an optimizer step has 8 of them per GPU. Each variant runs in processes of
its own, for SECONDS at most; a failure is reported and the next one runs. Each writes OUT/<variant>.json and .log.

    MFU = 6 (N t + L n d S) / (seconds x GPUs x 989e12)

N: parameters in the matrix products of one token (attention, router, 8 of 128 experts, output layer); t: tokens;
L layers with n heads of dimension d; S: sum of squared sample lengths (attention is causal: half of the products).
"""

import argparse
import dataclasses
import faulthandler
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

from train_gpu import GIB, LENGTH, MICRO_BATCHES, PEAK, WARMUP, make_traces, measure, randomize, settings, usual_step

from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.launch.job import ENVIRONMENT
from rsft_lib.model import transformer_config
from rsft_lib.model.config import read_config
from rsft_lib.model.distributed import ranks
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.flops import matmul_parameters, parameters, training_flops

SHAPE = {  # https://huggingface.co/Qwen/Qwen3-30B-A3B, config.json; 48 layers there
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151_936, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0, "max_position_embeddings": 40_960, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
PREDICTED = {  # MFU, before the first measurement: 8 layers on one H200
    "floor": 0.55, "ours": 0.38, "selective": 0.36, "exchanged": 0.36, "megatron": 0.30, "transformers": 0.15,
}  # fmt: skip
STEPS = 3
ALONE = "floor", "transformers"  # on one GPU


def ours(config: TrainConfig) -> dict:
    """The kit's training step."""
    result = measure(config, STEPS)
    load = torch.tensor(result.pop("load"), dtype=torch.float64).unflatten(1, (config.expert_parallel, -1)).sum(dim=2)
    return result | {"busiest_gpu": (load.max(dim=1).values / load.mean(dim=1)).mean().item()}


def selective(config: TrainConfig) -> dict:
    return ours(dataclasses.replace(config, recompute="selective"))


def exchanged(config: TrainConfig) -> dict:
    """A token is sent once per expert, although it has more experts than there are ranks."""
    experts = transformer_config._experts
    dispatcher = {"moe_token_dispatcher_type": "alltoall"}
    with mock.patch.object(transformer_config, "_experts", lambda *given: experts(*given) | dispatcher):
        return ours(config)


def megatron(config: TrainConfig) -> dict:
    """megatron-core's GPTModel with its specs for Transformer Engine, attention, loss, DDP, and TE's FusedAdam."""
    from gpu_rent import fused_adam, fused_adam_step
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.module import Float16Module

    from rsft_lib.training.build import model_settings
    from rsft_lib.training.optimizer import gradient_norm
    from rsft_lib.training.state import TrainState

    hf = read_config(config.checkpoint)
    core = model_settings(config, hf)
    core.cross_entropy_loss_fusion = True
    core.finalize_model_grads_func, core.grad_scale_func = None, None
    core.fused_single_qkv_rope = False  # of the kit's own layers
    model = GPTModel(
        core, get_gpt_decoder_block_spec(core, use_transformer_engine=True, normalization="RMSNorm"), hf.vocab_size,
        LENGTH, position_embedding_type="rope", rotary_base=1_000_000, share_embeddings_and_output_weights=False,
    ).cuda()  # fmt: skip
    overlap = torch.distributed.get_world_size() > 1
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=config.gradients == "fp32", overlap_grad_reduce=overlap,
        overlap_param_gather=overlap, check_for_nan_in_grad=False,
    )  # fmt: skip
    chunk = DistributedDataParallel(core, ddp, Float16Module(core, model))
    optimizer = fused_adam(config, [chunk])
    randomize(TrainState([chunk], optimizer, None))

    def micro_step(batch: dict) -> None:
        ends = batch["cu_seqlens"].cuda()
        longest = int(batch["cu_seqlens"].diff().max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        losses = chunk(
            batch["tokens"].cuda(), batch["position_ids"].cuda(), None, labels=batch["labels"].cuda(),
            packed_seq_params=packed,
        )  # fmt: skip
        (losses.float() * batch["loss_mask"].cuda()).sum().backward()

    def step(batches: list[dict]) -> None:
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        for number, batch in enumerate(batches, start=1):
            with nullcontext() if number == len(batches) else chunk.no_sync():
                micro_step(batch)
        finalize_model_grads([chunk], None)
        trained = sum(float(batch["loss_mask"].sum()) for batch in batches) * torch.distributed.get_world_size()
        fused_adam_step(optimizer, gradient_norm(optimizer) / trained, trained, config.clip_grad)

    return timed(config, step)


def transformers(config: TrainConfig) -> dict:
    """transformers with grouped matrix products, torch's varlen attention and fused AdamW; all states in bf16.

    On one GPU only, since it does not partition the experts of a model in training.
    """
    from gpu_peers import _forward_backward, varlen
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["varlen"] = varlen
    hf = read_config(config.checkpoint)
    hf._attn_implementation = "varlen"
    torch.set_default_device("cuda")
    network = AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, experts_implementation="grouped_mm").train()
    torch.set_default_device("cpu")
    adam = torch.optim.AdamW(network.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batches: list[dict]) -> None:
        for batch in batches:
            _forward_backward(network, batch)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return timed(config, step) | {"experts": network.config._experts_implementation}


def timed(config: TrainConfig, step) -> dict:
    """Median time of `step` over this rank's packs of the step that `measure` uses, with its formula of MFU."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    data = PackedDataset(TokenStore(config.data), LENGTH, 0)
    packs = usual_step(data, config.global_batch_size)
    batches, seconds = [data.batch([pack]) for pack in packs[rank::world]], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARMUP + STEPS):
        torch.distributed.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(batches)
        torch.cuda.synchronize()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - began)
    taken = statistics.median(seconds[WARMUP:])
    flops = training_flops(read_config(config.checkpoint), LENGTH * len(packs), sum(map(data.cost, packs)))
    return {
        "ms_per_micro_batch": 1000 * taken / len(packs), "tokens_per_second": LENGTH * len(packs) / taken,
        "mfu": flops / taken / PEAK, "peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }  # fmt: skip


def floor(config: TrainConfig) -> dict:
    """The products of a micro-batch at the speed of dense cuBLAS, attention, and AdamW's and the experts' traffic."""
    from gpu_floor import _attention, _bandwidth, _product

    hf = read_config(config.checkpoint)
    queries, keys = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    shapes = {
        "qkv": (hf.hidden_size, queries + 2 * keys, 1), "proj": (queries, hf.hidden_size, 1),
        "fc1": (hf.hidden_size, 2 * hf.moe_intermediate_size, hf.num_experts_per_tok),
        "fc2": (hf.moe_intermediate_size, hf.hidden_size, hf.num_experts_per_tok),
    }  # fmt: skip
    products = {name: times * sum(_product(i, o).values()) for name, (i, o, times) in shapes.items()}
    head = sum(_product(hf.hidden_size, hf.vocab_size).values())
    bandwidth = _bandwidth()
    adam = parameters(hf) * 28 / bandwidth * 1000 / MICRO_BATCHES  # of 8 micro-batches and all parameters per GPU
    # Rows to the experts and back, forward and backward: each written and read once.
    moved = hf.num_hidden_layers * 4 * 2 * LENGTH * hf.num_experts_per_tok * hf.hidden_size * 2 / bandwidth * 1000
    data = PackedDataset(TokenStore(config.data), LENGTH, 0)
    attention = hf.num_hidden_layers * _attention(hf, Path(config.data), alone=False)
    total = hf.num_hidden_layers * sum(products.values()) + head + attention + adam + moved
    squares = sum(map(data.cost, usual_step(data))) / MICRO_BATCHES
    return {
        "ms_per_micro_batch": total, "mfu": training_flops(hf, LENGTH, squares) / (total / 1000) / PEAK,
        "products_ms": products, "head_ms": head, "attention_ms": attention, "adam_ms": adam, "moved_ms": moved,
    }  # fmt: skip


VARIANTS = {
    "floor": floor, "ours": ours, "selective": selective, "exchanged": exchanged, "megatron": megatron,
    "transformers": transformers,
}  # fmt: skip


def run_here(name: str, config: TrainConfig, output: Path) -> None:
    """Run a variant on this process's GPU; the first rank writes the result, or the error."""
    with ranks(expert_parallel_size=1 if name in ALONE else config.expert_parallel):
        world, first = torch.distributed.get_world_size(), torch.distributed.get_rank() == 0
        try:
            result = VARIANTS[name](config)
            if name != "floor":
                result["mfu"] /= world
                result["ms_per_micro_batch"] *= world
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        if first:
            hf = read_config(config.checkpoint)
            result |= {"gpus": world, "layers": hf.num_hidden_layers}
            (output / f"{name}.json").write_text(json.dumps(result, indent=1))
    sys.stdout.flush()
    os._exit("error" in result)  # without cleanup, which may hang after an error


def run_variant(name: str, arguments: argparse.Namespace) -> None:
    """Run a variant in processes of its own."""
    given = [f"--{key}={value}" for key, value in vars(arguments).items() if key not in ("variants", "here")]
    start = [sys.executable]
    if arguments.gpus > 1 and name not in ALONE:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.gpus}"]
    command, began = [*start, __file__, *given, "--here", name], time.time()
    (arguments.output / f"{name}.json").unlink(missing_ok=True)
    with (arguments.output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**ENVIRONMENT, **os.environ}, start_new_session=True
        )
        try:
            process.wait(arguments.seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which have sessions of their own
            process.wait()
    print(f"{name}: {time.time() - began:.0f} s", flush=True)


def table(output: Path, model: Path) -> str:
    hf = read_config(model)
    head = hf.vocab_size * hf.hidden_size / matmul_parameters(hf)
    lines = [
        f"{hf.num_hidden_layers} layers, {parameters(hf) / 1e9:.2f}e9 parameters, {matmul_parameters(hf) / 1e9:.2f}e9 "
        f"of them in the products of a token ({head:.0%} output layer)",
        f"{'':14}{'ms':>10}{'MFU':>8}{'predicted':>11}{'GiB':>8}{'tokens/s':>11}",
    ]
    for name in VARIANTS:
        file = output / f"{name}.json"
        result = json.loads(file.read_text()) if file.exists() else {"error": f"no result: see {name}.log"}
        if "error" in result:
            lines.append(f"{name:14}  {result['error'][:120]}")
            continue
        nan = float("nan")
        lines.append(
            f"{name:14}{result['ms_per_micro_batch']:10.1f}{result['mfu']:8.3f}{PREDICTED[name]:11.2f}"
            f"{result.get('peak_gib', nan):8.1f}{result.get('tokens_per_second', nan):11,.0f}"
        )
        if "expert_load_max" in result:
            lines[-1] += f"  busiest expert {result['expert_load_max']:.1f} x the mean, GPU {result['busiest_gpu']:.2f}"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--ep", type=int, default=0, help="expert-parallel size; the number of GPUs by default")
    parser.add_argument("--layers", type=int, default=0, help="8 per GPU by default")
    parser.add_argument("--moments", default="fp32", help="dtype of AdamW's moments: fp32 or bf16")
    parser.add_argument("--gradients", default="fp32", help="dtype of gradients: fp32 or bf16")
    parser.add_argument("--seconds", type=int, default=150, help="time limit of each variant")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--here", choices=list(VARIANTS), help="run in this process")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    inputs = arguments.output / "inputs"
    config = settings(
        inputs, backend="te", expert_parallel=arguments.ep or arguments.gpus, moments=arguments.moments,
        gradients=arguments.gradients,
        global_batch_size=MICRO_BATCHES * (1 if arguments.here in ALONE else arguments.gpus),
    )  # fmt: skip
    if arguments.here:
        faulthandler.dump_traceback_later(0.8 * arguments.seconds)  # where it is, should it be too slow
        run_here(arguments.here, config, arguments.output)
    inputs.mkdir(parents=True, exist_ok=True)
    make_traces(inputs)
    (inputs / "model").mkdir(exist_ok=True)
    shape = SHAPE | {"num_hidden_layers": arguments.layers or 8 * arguments.gpus}
    (inputs / "model" / "config.json").write_text(json.dumps(shape))
    for name in arguments.variants:
        run_variant(name, arguments)
    print(table(arguments.output, inputs / "model"))


if __name__ == "__main__":
    main()
