"""The training loop: megatron-core's schedules and optimizer, until the last step or a reason to stop."""

import gc
import itertools
import math
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from rsft_lib.checkpoint.formats import torch_dist
from rsft_lib.checkpoint.run_checkpoints import intact
from rsft_lib.common.artifact import DamagedError, write_json
from rsft_lib.common.device import device
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.data.packed import PackedDataset
from rsft_lib.model.config import read_config
from rsft_lib.model.router import expert_load
from rsft_lib.training import expert_stats, loss_stats, optimizer, watchdog
from rsft_lib.training.alarms import Alarms
from rsft_lib.training.batches import Loader, run_batch
from rsft_lib.training.build import build_state
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.datasets import Datasets, open_datasets
from rsft_lib.training.flops import peak_flops, training_flops
from rsft_lib.training.live_answers import LiveAnswers
from rsft_lib.training.metrics import open_writers
from rsft_lib.training.preflight import checkpoint_bytes, describe
from rsft_lib.training.run_folder import ENDED, how_it_ended
from rsft_lib.training.same_run import facts_of, refuse_another_run
from rsft_lib.training.saving import Saver
from rsft_lib.training.signals import REASONS, Stop, stopping
from rsft_lib.training.state import TrainState, load, start


def train(config: TrainConfig) -> TrainState:
    """Train until the last step or a reason to stop, resuming from the newest checkpoint in the run folder.

    At the end, `ended.json` in the run folder contains the reason and the last step.
    """
    output, checkpoint = resolve(config.output), require_path(config.checkpoint, "checkpoint")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # The order matters: on SIGTERM the watchdog writes the stack, then calls the handler of `stopping`.
    with stopping(config.time_limit) as stop, watchdog.watched(output, rank, ranks, config.hang_timeout):
        (output / ENDED).unlink(missing_ok=True)
        data = open_datasets(config)
        config = config.for_packs(len(data.train))
        hf = read_config(checkpoint)
        if rank == 0:
            nproc = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
            print(describe(config, hf, data, nproc, ranks // nproc), flush=True)
            if data.train.control is None:
                print("no losses by mode: the data's tokenizer is missing or has no control tokens", flush=True)
        state = build_state(config, checkpoint)
        state.watch(data.train.control)
        with watchdog.deadline(max(watchdog.START, config.save_timeout)):
            facts = facts_of(config, data, checkpoint) if rank == 0 else {}
            begin(state, output, checkpoint, facts)
        saver = Saver(
            output, checkpoint / "config.json", facts, iteration=state.iteration, size=checkpoint_bytes(config, hf),
            timeout=config.save_timeout, keep_last=config.keep_last, keep_every=config.keep_every,
            keep_best=config.keep_best,
        )  # fmt: skip
        if config.async_save:
            saver.reserve(state)
        run = Run(config, state, data, hf, output, stop, saver)
        run.evaluate_start()
        gc.freeze()  # these objects live until the end; every collection over them would take half a second
        while state.iteration < config.train_iters and not run.stopped:
            run.step()
        run.end()
    return state


def begin(state: TrainState, output: Path, checkpoint: Path, facts: dict) -> None:
    """Resume `state` from the newest checkpoint in `output`, else load the base weights; only rank 0 needs `facts`."""
    first = torch.distributed.get_rank() == 0
    folders = intact(output, torch_dist.check_listing)
    while True:
        resume: list[Path | None] = [next(folders, None) if first else None]
        changed = refuse_another_run(resume[0], facts) if resume[0] else []
        torch.distributed.broadcast_object_list(resume)
        if resume[0] is None:
            start(state, checkpoint)
            return
        try:
            load(state, resume[0])
            break
        except DamagedError as error:
            if first:
                print(f"skipping a checkpoint: {error}", flush=True)
    if first:
        rate = state.optimizer.param_groups[0]["lr"]
        message = f"resumed from {resume[0]}: next step {state.iteration + 1:,}, learning rate {rate:.2e}"
        print(message, *(f"  {line}" for line in changed), sep="\n", flush=True)


class Run:
    """A run in progress."""

    def __init__(
        self, config: TrainConfig, state: TrainState, data: Datasets, hf: PretrainedConfig, output: Path, stop: Stop,
        saver: Saver,
    ):  # fmt: skip
        self.config, self.state, self.data, self.hf, self.output = config, state, data, hf, output
        self.stop, self.saver, self.stopped, self.alarms = stop, saver, "", Alarms()
        self.first = torch.distributed.get_rank() == 0
        self.loader, self.answers = Loader(data.train, config), None
        if config.eval_generate_every and not (config.eval_questions or config.eval_data):
            if self.first:
                print("no questions are asked (eval_generate_every): give eval_questions or eval_data", flush=True)
        elif config.eval_generate_every:
            store = (data.held_out or data.train).store
            self.answers = LiveAnswers(config, store, output, saver.model_config, state.iteration)
        self.writers = open_writers(output, state.iteration, config) if self.first else []

    def step(self) -> None:
        """One optimizer step, followed by evaluation, metrics, log and checkpoint where due."""
        config, state, began = self.config, self.state, time.perf_counter()
        record, load = self._train(began)
        last = state.iteration == config.train_iters
        record |= self._evaluate(last)
        self._look_for_alarms(record, load)
        self._write(record, last)
        self._agree(time.perf_counter() - began)
        if last or self.stopped or state.iteration % config.save_interval == 0:
            self.saver.save(state, wait=last or bool(self.stopped) or not config.async_save)
        watchdog.end_step()

    def evaluate_start(self) -> None:
        """At the start of a new run, write the evaluation of the model as it is; its step is 0.

        Raises:
            ValueError: the metric of `keep_best` is not among those evaluated.
        """
        if self.state.iteration:
            return
        found, best = self._evaluate(last=False), self.config.keep_best
        answered = "questions" in found or not self.answers  # or else the memory did not suffice
        if best and best not in found and (answered or best.startswith("eval_")):
            raise ValueError(f"keep_best is {best!r}, which no evaluation has; they have {', '.join(found) or 'none'}")
        for writer in self.writers if found else ():
            writer.write(iteration=0, **found)
        if self.first and found:
            losses = [f"{name} {value:.4f}" for name, value in found.items() if name.endswith("_loss")]
            print("before the first step:", ", ".join(losses), flush=True)

    def _evaluate(self, last: bool) -> dict[str, float]:
        """Losses on held-out data and the scores of answers to held-out questions, where they are due."""
        config, state = self.config, self.state
        record: dict[str, float] = {}
        if last or state.iteration % config.eval_interval == 0:
            for prefix, data in self.data.evaluated().items():
                record |= evaluate(state, config, data, prefix)
        if self.data.test and last:
            record |= evaluate(state, config, self.data.test, "test_")
        if self.answers and (last or state.iteration % config.eval_generate_every == 0):
            record |= self.answers(state)
        return record

    def end(self) -> None:
        """Finish the last checkpoint, and record and print how the run ended."""
        self.saver.finish()
        for writer in self.writers:
            writer.close()
        if self.first:
            reason = self.stopped or "finished"
            write_json(self.output / ENDED, {"reason": reason, "iteration": self.state.iteration})
            print(f"{how_it_ended(self.output)} after step {self.state.iteration}", flush=True)
            if self.stopped:
                print("run again to resume", flush=True)

    def _train(self, began: float) -> tuple[dict, torch.Tensor | None]:
        """Update the model with one global batch; return the record of the step and the load of the experts."""
        config, state, data = self.config, self.state, self.data.train
        packs, following = (data.step(state.iteration + i, config.global_batch_size) for i in range(2))
        waited = self.loader.waited
        done = update(state, self.loader, packs, following)
        waited = self.loader.waited - waited
        numbers = loss_stats.metrics(done.counts, kinds=data.control is not None)
        if not done.finite():
            self._give_up(numbers["loss"], done.norm, packs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ended, trained = time.perf_counter(), loss_stats.trained_tokens(done.counts)
        state.iteration += 1
        record = {
            "iteration": state.iteration,
            **numbers,
            "lr": state.optimizer.param_groups[0]["lr"],
            "grad_norm": done.norm,
            "trained_tokens": trained,
            "samples_sha256": data.samples_sha256(packs),
            **expert_stats.metrics(done.load),
            **self._speed(packs, trained, ended - began),
            "epoch": state.iteration * config.global_batch_size / len(data),
            "seconds_data": waited,
            "seconds_forward_backward": done.computed - began - waited,
            "seconds_optimizer": ended - done.computed,
        }
        state.scheduler.step(increment=1)
        return record, done.load

    def _speed(self, packs: list[int], trained: int, seconds: float) -> dict:
        tokens = self.config.global_batch_size * self.config.seq_length
        speed = {
            "tokens_per_second": tokens / seconds,
            "trained_tokens_per_second": trained / seconds,
            "seconds": seconds,
            "memory_gib": peak_memory() / 2**30,
        }
        if peak := peak_flops():
            squares = sum(self.data.train.cost(index) for index in packs)
            flops = training_flops(self.hf, tokens, squares)
            speed["mfu"] = flops / seconds / peak / torch.distributed.get_world_size()
        return speed

    def _look_for_alarms(self, record: dict, load: torch.Tensor | None) -> None:
        alarms = self.alarms.look(record, load)
        if alarms:
            record["alarms"] = alarms
            if self.first:
                print("\n".join(f"ALARM after step {record['iteration']}: {alarm}" for alarm in alarms), flush=True)
            if self.config.alarm_stop:
                self.stop.ask("alarm")

    def _write(self, record: dict, last: bool) -> None:
        for writer in self.writers:
            writer.write(**record)
        if self.first and (last or self.state.iteration % self.config.log_interval == 0):
            print(log_line(record, self.config.train_iters), flush=True)

    def _agree(self, seconds: float) -> None:
        """All-reduce the reason to stop, and whether any rank is still writing a checkpoint."""
        self.stop.look_at_the_clock(seconds)
        flags = torch.tensor([self.stop.reason, not self.saver.written()], dtype=torch.int32, device=device())
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        reason, writing = flags.tolist()
        self.stopped = REASONS[reason]
        if not writing:
            self.saver.go_on()

    def _give_up(self, loss: float, norm: float, packs: list[int]) -> None:
        """End the run before a non-finite update, and write the batch's sample numbers to a file.

        Raises:
            FloatingPointError: always.
        """
        number, samples = self.state.iteration + 1, self.data.train.samples(packs)
        path = self.output / f"broken_step_{number:07d}.json"
        if self.first:
            write_json(path, {"iteration": number, "loss": str(loss), "grad_norm": str(norm), "samples": samples})
        raise FloatingPointError(
            f"step {number}: loss {loss}, gradient norm {norm}; nothing was updated or saved. {path} lists the "
            f"batch's samples in {self.config.data}; inspect them or lower lr"
        )


class Update(NamedTuple):
    """Result of the update with one global batch."""

    counts: list[float]
    """The batch's tally."""
    norm: float
    """Global L2 norm of the gradient, before clipping."""
    computed: float
    """The `time.perf_counter` when the gradient was computed."""
    load: torch.Tensor | None
    """Tokens of each expert, int64 [layers, experts] on the CPU; None for a dense model."""

    def finite(self) -> bool:
        """Whether loss and gradient are finite; otherwise nothing was updated."""
        return math.isfinite(self.counts[0]) and math.isfinite(self.norm)


def update(state: TrainState, loader: Loader, packs: list[int], following: list[int] | None = None) -> Update:
    """Train on the global batch of `packs`; `following` is the next one, to be prefetched."""
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    counted = run_batch(state, loader, packs, following)
    norm = optimizer.gradient_norm(state.optimizer)
    counts = counted.tolist()
    denominator = loss_stats.weight_sum(counts)
    load = expert_load(state.chunks)
    done = Update(counts, norm / denominator, time.perf_counter(), load)
    if done.finite():
        optimizer.step(state.optimizer, done.norm, denominator, loader.config.clip_grad)
    return done


@torch.no_grad()
def evaluate(state: TrainState, config: TrainConfig, data: PackedDataset, prefix: str) -> dict[str, float]:
    """Metrics over the first `eval_iters` batches of held-out data, the same in every evaluation."""
    for chunk in state.chunks:
        chunk.eval()
    batches = min(config.eval_iters, -(-len(data) // config.global_batch_size))
    packs, loader = [data.once(i, config.global_batch_size) for i in range(batches)], Loader(data, config)
    tallies = [
        run_batch(state, loader, batch, following, forward_only=True).tolist()
        for batch, following in itertools.zip_longest(packs, packs[1:])
    ]
    total = [sum(column) for column in zip(*tallies, strict=True)]
    return loss_stats.metrics(total, prefix, kinds=data.control is not None)


def peak_memory() -> int:
    """Peak memory of this process in bytes: allocated on the GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def log_line(record: dict, train_iters: int) -> str:
    """The log line of one step."""
    line = (
        f"step {record['iteration']:>6}/{train_iters}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tokens/s"
    )
    line += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return line + (f"  eval loss {record['eval_loss']:.4f}" if "eval_loss" in record else "")
