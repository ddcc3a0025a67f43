"""Load every model in a folder at every TP x PP, with EP = TP, and compare logits: `grid.py FOLDER`.

For test_families.py. Ranks are forked from one process that has imported everything, so that sixteen of them start
fast. FOLDER has a folder for each model with `expected.pt`, the logits of transformers, and the weights to load:
`legacy_TP2PP1` and so on for one layout, `torch_dist` and `hf` for all of them. Prints `model kind TPxPP difference`.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from rsft_lib.checkpoint.sharded import load_weights  # noqa: E402
from rsft_lib.model.config import read_config  # noqa: E402
from rsft_lib.model.cpu_shim import cuda_on_cpu  # noqa: E402
from rsft_lib.model.gpt import build_model  # noqa: E402
from rsft_lib.model.transformer_config import transformer_config  # noqa: E402
from rsft_lib.model.weight_map import expert_count  # noqa: E402

SIZES = (1, 2, 4)
WITH_TRANSFORMER_ENGINE = {  # names of the local layers -> names of Transformer Engine's
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def logits(model, ids):
    """[1, s, padded vocabulary] on the last pipeline stage, None elsewhere."""

    def forward_step(data, model):
        output = model(next(data), torch.arange(ids.shape[1])[None], None)
        return output, lambda output, non_loss_data: output

    collected = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([ids]), model=[model], num_microbatches=1,
        seq_length=ids.shape[1], micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    if not collected:
        return None
    parts = [torch.empty_like(collected[0]) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, collected[0], group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def te_name(name: str) -> str:
    for ours, theirs in WITH_TRANSFORMER_ENGINE.items():
        name = name.replace(f".{ours}", f".{theirs}")
    return name


def check_legacy(folder: Path, model, config, tp: int, pp: int) -> None:
    """Check that a rank's file has the contents of the state dict that megatron-core builds for the rank."""
    tp_rank, pp_rank = (
        parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank(),
    )  # fmt: skip
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    name = f"mp_rank_{tp_rank:02d}" if pp == 1 else f"mp_rank_{tp_rank:02d}_{pp_rank:03d}"
    content = torch.load(folder / "iter_0000001" / name / "model_optim_rng.pt", weights_only=True)
    assert content.keys() == {"model", "iteration", "checkpoint_version"} and content["checkpoint_version"] == 3.0
    found, expected = content["model"], {te_name(key): value for key, value in model.state_dict().items()}
    attention = {key for key in found if key.endswith("core_attention._extra_state")}
    assert len(attention) == config.num_hidden_layers // pp and found.keys() - attention == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        elif value.shape[0] == model.vocab_size // tp:  # Megatron-LM pads the vocabulary further than we do
            assert len(found[key]) == -(-config.vocab_size // (128 * tp)) * 128, key
        else:
            assert torch.equal(found[key], value), key


@torch.no_grad()
def compare(folder: Path, tp: int, pp: int) -> None:
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=tp, expert_tensor_parallel_size=1)
    for model_folder in sorted(folder.iterdir()):
        ids, expected = torch.load(model_folder / "expected.pt")
        config = read_config(model_folder / "hf")
        settings = transformer_config(
            config, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32,
            expert_model_parallel_size=tp if expert_count(config) else 1,
        )  # fmt: skip
        kinds = ("hf", "torch_dist", f"legacy_TP{tp}PP{pp}")
        for kind in kinds[:2] if expert_count(config) else kinds:
            model = build_model(config, settings, "torch", ids.shape[1]).eval()
            load_weights(model, model_folder / kind)
            if kind.startswith("legacy"):
                check_legacy(model_folder / kind, model, config, tp, pp)
            found = logits(model, ids)
            if found is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
                assert not found[..., config.vocab_size :].any(), "rows of padding are zero"
                difference = (found[..., : config.vocab_size] - expected).abs().max().item()
                print(f"{model_folder.name} {kind} {tp}x{pp} {difference:.1e}", flush=True)
    parallel_state.destroy_model_parallel()


def rank(folder: Path, number: int, layouts: list[tuple[int, int]]) -> None:
    torch.set_num_threads(1)
    with cuda_on_cpu():
        for tp, pp in layouts:
            if number < tp * pp:
                store = torch.distributed.FileStore(str(folder.with_name(f"store-{tp}-{pp}")), tp * pp)
                torch.distributed.init_process_group("gloo", store=store, rank=number, world_size=tp * pp)
                compare(folder, tp, pp)
                torch.distributed.destroy_process_group()


def main() -> None:
    folder, layouts = Path(sys.argv[1]), [(tp, pp) for tp in SIZES for pp in SIZES]
    children = []
    for number in range(max(tp * pp for tp, pp in layouts)):
        child = os.fork()
        if not child:
            rank(folder, number, layouts)
            os._exit(0)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would block
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit("a rank failed")


if __name__ == "__main__":
    main()
