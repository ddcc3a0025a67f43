"""Held-out questions answered during training (eval_generate_every), on one GPU: their cost, speed and floor.

    RSFT_REAL_DATA=FOLDER python benchmarks/live_answers_gpu.py --output OUT [--seconds 480] [--parts ...] [--tiny]

The model is DeepSeek-R1-Distill-Qwen-1.5B's shape with random weights, which practically never choose EOS: every answer
runs to its limit, the worst case. Each part runs in its own process, which is ended when the time is over, and writes
OUT/<part>.json; a table follows.

    training      seconds of a training step (8 packs of 16,384 tokens, and from these of the default global batch), of
                  writing and loading the model, and of the answers, as LiveAnswers gives them beside the training
    transformers  `generate` on the exported model and the same prompts: all in one batch, and a mode at a time
    vllm          the same by vLLM, if it is installed
    floor         the bytes that every token step reads, at the speed of a copy

--tiny tries all of it with the demo's model, also on a CPU.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers.generation.utils  # noqa: F401 - within `cpu_shim` its import, with torch's compiler, would fail
from transformers import AutoModelForCausalLM, GenerationConfig

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one

from train_gpu import make_traces, randomize, settings, usual_step

from rsft_lib import demo
from rsft_lib.data.packed import PackedDataset
from rsft_lib.data.store import TokenStore
from rsft_lib.data.tokenize import tokenize
from rsft_lib.launch.job import ENVIRONMENT
from rsft_lib.model.distributed import ranks
from rsft_lib.tokenizer.chat import prompt_ids
from rsft_lib.tokenizer.patch import load_tokenizer, patch_tokenizer
from rsft_lib.training.batches import Loader
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.live_answers import LiveAnswers
from rsft_lib.training.loop import update

DEFAULTS = TrainConfig(checkpoint="", data="", output="")
INTERVAL = DEFAULTS.eval_interval  # steps between evaluations
GIB = 2**30


def make_inputs(folder: Path, tiny: bool) -> None:
    """Write tokenizer, config.json, traces and questions, unless that was done before."""
    if (folder / "ready").exists():
        return
    if tiny:
        demo.make_model(folder / "demo", seed=1)
        sources = demo.make_sources(folder / "sources", 60, seed=1)
        patch_tokenizer(folder / "demo", folder / "tokenizer", {"<|quad_start|>": "<short>"})
        tokenize(sources / "long.jsonl", folder / "tokenizer", folder / "traces", max_length=513)
        model, questions = folder / "demo", sources / "short.jsonl"
    else:
        real = Path(os.environ["RSFT_REAL_DATA"])
        make_traces(folder)
        model, questions = real / "tokenizers" / "r1-distill-qwen", real / "data" / "short_gsm8k_train.jsonl"
    (folder / "model").mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({"dtype": "float32" if tiny else "bfloat16"} | config))
    (folder / "questions.jsonl").write_bytes(questions.read_bytes())
    (folder / "ready").touch()


def config_of(folder: Path, tiny: bool) -> TrainConfig:
    small = {**demo.TINY, "eval_question_count": 4, "eval_max_new_tokens": 16} if tiny else {}
    return settings(folder, eval_questions=str(folder / "questions.jsonl"), **small)


class Timed(LiveAnswers):
    """Held-out questions whose answers are timed, and whose exported model is kept."""

    def _export(self, state, folder, first):
        with timed(self.seconds, "export"):
            super()._export(state, folder, first)

    def _answer(self, model):
        with timed(self.seconds, "answer"):
            answers = super()._answer(model)
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(model, self.kept)
        self.written = sum(answer.tokens + answer.ended for of_mode in answers.values() for answer in of_mode)
        return answers


def training(folder: Path, tiny: bool) -> dict:
    """Seconds of a training step and of an evaluation by answers, the first of which has few tokens."""
    config, found = config_of(folder, tiny), {}
    with ranks():
        state = build_state(config, Path(config.checkpoint))
        randomize(state)
        found |= {"step": step_seconds(state, config), "gib_training": peak_gib()}
        found["step_default"] = found["step"] * DEFAULTS.global_batch_size / config.global_batch_size
        run, store = Path(config.output), TokenStore(config.data)
        run.mkdir(exist_ok=True)
        for what, limit in (("warm", 8), ("full", config.eval_max_new_tokens)):
            shorter = replace(config, eval_max_new_tokens=limit)
            live = Timed(shorter, store, run, folder / "model" / "config.json", 0)
            live.seconds, live.kept, live.written = {}, folder / "exported", 0
            metrics = live(state)
            found |= {f"{name}_{what}": seconds for name, seconds in live.seconds.items()}
            save_prompts(live, folder)
        found |= {"step_after": step_seconds(state, config), "gib_answering": peak_gib(), "tokens": live.written}
    found["cut_off"] = sum(value for name, value in metrics.items() if name.endswith("_cut_off"))
    found["evaluation"] = found["export_full"] + found["answer_full"]
    found["tokens_per_second"] = live.written / found["answer_full"]
    found["share_of_training"] = found["evaluation"] / (INTERVAL * found["step_default"])
    return found


def step_seconds(state, config: TrainConfig) -> float:
    """Median seconds of an optimizer step, on the packs of the step with the usual cost."""
    data, seconds = PackedDataset(TokenStore(config.data), config.seq_length, 0), {}
    packs, loader = usual_step(data, config.global_batch_size), Loader(data, config)
    for number in range(4):
        with timed(seconds, str(number)):
            update(state, loader, packs, packs)
    return statistics.median(list(seconds.values())[1:])


def save_prompts(live: LiveAnswers, folder: Path) -> None:
    tokenizer, dialect = load_tokenizer(live.tokenizer), live.dialect
    prompts = [
        [prompt_ids(tokenizer, q.messages, mode if mode in dialect.forms else None, q.tools, dialect)
         for q in live.questions] for mode in live.modes
    ]  # fmt: skip
    given = {"prompts": prompts, "tokens": live.sampling.max_new_tokens, "eos": tokenizer.eos_token_id}
    (folder / "prompts.json").write_text(json.dumps(given))


def asked(folder: Path) -> tuple[list[list[list[int]]], int, int]:
    """(prompts of each mode, tokens of each answer, id of EOS)"""
    given = json.loads((folder / "prompts.json").read_text())
    return given["prompts"], given["tokens"], given["eos"]


def generate(folder: Path, tiny: bool) -> dict:
    """transformers' `generate`, called directly."""
    by_mode, limit, eos = asked(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if tiny else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=dtype).to(device).eval()
    model.generation_config = GenerationConfig()

    @torch.no_grad()
    def write(prompts: list[list[int]], limit: int) -> int:
        width = max(map(len, prompts))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        given = {"attention_mask": mask, "pad_token_id": eos, "do_sample": False}
        return model.generate(ids, **given, max_new_tokens=limit, min_new_tokens=limit)[:, width:].numel()

    write(by_mode[0], 8)
    found, batches = {}, {"one_batch": [sum(by_mode, [])], "mode_at_a_time": by_mode}
    for name, prompts in batches.items():
        with timed(found, name):
            tokens = sum(write(batch, limit) for batch in prompts)
        found[f"{name}_tokens_per_second"] = tokens / found[name]
    return found | {"tokens_per_second": found["one_batch_tokens_per_second"], "peak_gib": peak_gib()}


def vllm(folder: Path, tiny: bool) -> dict:
    if importlib.util.find_spec("vllm") is None:
        return {"skipped": "vllm is not installed"}
    from vllm import LLM, SamplingParams

    by_mode, limit, _ = asked(folder)
    prompts = [{"prompt_token_ids": ids} for ids in sum(by_mode, [])]
    found: dict = {}
    with timed(found, "load"):
        model = LLM(model=str(folder / "exported"), dtype="float32" if tiny else "bfloat16", max_model_len=4096)
    sampling = lambda n: SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)  # noqa: E731
    model.generate(prompts, sampling(8))
    with timed(found, "answer"):
        outputs = model.generate(prompts, sampling(limit))
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return found | {"tokens_per_second": tokens / found["answer"]}


def floor(folder: Path, tiny: bool) -> dict:
    """Bytes of a token step: all weights but the embedding, of which only rows are read, and half of the full cache."""
    by_mode, limit, _ = asked(folder)
    config = json.loads((folder / "exported" / "config.json").read_text())
    size = 4 if tiny else 2
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    row = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * size
    files = sum(path.stat().st_size for path in (folder / "exported").glob("*.safetensors"))
    weights = files - (config["vocab_size"] * config["hidden_size"] * size) * (not config.get("tie_word_embeddings"))
    prompts = sum(by_mode, [])
    cache = row * sum(len(prompt) + limit / 2 for prompt in prompts)
    rate = copy_rate(2**20 if tiny else 4 * GIB)
    step, bare = (weights + cache) / rate, weights / rate
    return {
        "weights_gb": weights / 1e9, "cache_gb": cache / 1e9, "bytes_per_second": rate, "ms_per_step": 1000 * step,
        "ms_per_step_weights_only": 1000 * bare, "answer": limit * step, "tokens_per_second": len(prompts) / step,
    }  # fmt: skip


def copy_rate(size: int) -> float:
    """Bytes per second read and written by a copy."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")
    target, seconds = torch.empty_like(source), {}
    for number in range(12):
        with timed(seconds, str(number)):
            target.copy_(source)
    return 2 * size / statistics.median(list(seconds.values())[2:])


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the seconds of a block, the GPU's work included, under the name `what`."""
    synchronize()
    began = time.perf_counter()
    yield
    synchronize()
    seconds[what] = time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """Peak memory since the last call."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peak


PARTS = {"training": training, "transformers": generate, "vllm": vllm, "floor": floor}


def run_part(name: str, arguments: argparse.Namespace, limit: float) -> None:
    """Run a part in its own process, for `limit` seconds at most, and print the end of its log if it failed."""
    command = [sys.executable, __file__, "--output", str(arguments.output), "--here", name]
    began, log = time.time(), arguments.output / f"{name}.log"
    (arguments.output / f"{name}.json").unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command + ["--tiny"] * arguments.tiny, stdout=file, stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, **os.environ}, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            code = "timeout"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{name}: {time.time() - began:.0f} s{f'  FAILED ({code})' if code else ''}", flush=True)
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), flush=True)


def table(output: Path) -> str:
    """The results, and the speeds as ratios."""
    found = {name: json.loads(path.read_text()) for name in PARTS if (path := output / f"{name}.json").exists()}
    lines = [f"{name}: {json.dumps(_rounded(result))}" for name, result in found.items()]
    speeds = {name: result["tokens_per_second"] for name, result in found.items() if "tokens_per_second" in result}
    if ours := speeds.get("training"):
        lines += [f"{name:14}{speed:12,.0f} tokens/s, LiveAnswers {ours / speed:.3f}" for name, speed in speeds.items()]
    if live := found.get("training"):
        share, seconds, step = live["share_of_training"], live["evaluation"], live["step_default"]
        lines.append(f"{seconds:.1f} s every {INTERVAL} steps of {step:.2f} s: {share:.2%} of the training time")
    return "\n".join(lines)


def _rounded(result: dict) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for inputs and results")
    parser.add_argument("--seconds", type=float, default=480, help="after which what is left is not measured")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="try it with the demo's model")
    parser.add_argument("--here", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    output = arguments.output = arguments.output.resolve()
    inputs, end = output / "inputs", time.time() + arguments.seconds
    if arguments.here:
        result = PARTS[arguments.here](inputs, arguments.tiny)
        (output / f"{arguments.here}.json").write_text(json.dumps(result, indent=1))
        return
    inputs.mkdir(parents=True, exist_ok=True)
    make_inputs(inputs, arguments.tiny)
    for name in arguments.parts:
        try:
            run_part(name, arguments, end - time.time())
        except Exception:
            traceback.print_exc()
    print(table(output))


if __name__ == "__main__":
    main()
