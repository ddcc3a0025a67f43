"""One training in one run folder: started, found running, or found finished."""

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from rsft_lib.common.artifact import checkpoint_folder, checkpoints, read_manifest, write_json
from rsft_lib.common.locks import locked
from rsft_lib.common.paths import existing, resolve
from rsft_lib.launch import local, slurm
from rsft_lib.launch.failure import ERRORS
from rsft_lib.launch.job import Job, read_job
from rsft_lib.launch.local import LocalJob, launch
from rsft_lib.launch.options import HERE, LaunchOptions
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.run_folder import CONFIG, ENDED, LOG, STOPPING, read_ended, read_record
from rsft_lib.training.watchdog import STACKS

FRESH = 120  # seconds after which a log that nobody writes no longer speaks for a run on another machine


def start_training(config: TrainConfig, nproc: int, options: LaunchOptions = HERE) -> Job:
    """The training in the run folder `config.output`: started, or gone on with from its newest checkpoint.

    Returns at once. One that runs already is not started a second time, and nothing is started where one has finished;
    the job is that one then.

    Args:
        nproc: ranks on each machine.

    Raises:
        ValueError: the ranks do not fit the settings, another run is in the folder, or Slurm refuses the job. Nothing
            has started then.
    """
    config.data_parallel(options.ranks(nproc))
    config, output = _with_steps(config), resolve(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".starting"):  # let no two look whether a training runs here, and both start one
        if job := attach(output):
            _refuse_others(job, config)
            print(f"found running, nothing was started: {job.state}", flush=True)
            return job
        common = {
            "train_iters": config.train_iters, "on_interrupt": options.on_interrupt, "patience": config.save_timeout,
        }  # fmt: skip
        if _finished(config, output):
            print(f"found finished, nothing was started; another run needs another folder than {output}", flush=True)
            return LocalJob(output, pid=0, birth="", **common)
        _refuse_elsewhere(output)
        _clear(output)
        write_json(output / CONFIG, config.to_json())
        if options.launcher == "slurm":
            return slurm.submit(output, nproc, options, **common)
        return local.start(output, nproc, **common)


def attach(run: str | Path) -> Job | None:
    """The training that runs in a run folder, or waits for its turn, whoever started it; None if none does.

    Raises:
        ValueError: it is for Slurm to say, and there is no Slurm here.
    """
    facts = read_job(resolve(run))
    if not facts:
        return None
    find = {"local": local.find, "slurm": slurm.find}[facts.pop("launcher")]
    return find(resolve(run), facts)


def launch_training(config: TrainConfig, nproc: int, poll: Callable[[], None] = lambda: None) -> None:
    """Train on `nproc` ranks of this machine to the end, or go on where the run folder `config.output` stands.

    Interrupted, it lets the ranks finish their step and save. `training.run_folder.read_ended` tells why a run ended.

    Raises:
        ValueError: the ranks do not fit the settings; nothing has started then.
        RunFailed: the training failed; the message begins with the traceback.
    """
    start_training(config, nproc).wait(poll)


def launch_scoring(checkpoint: str | Path, data: str | Path, output: str | Path, nproc: int) -> None:
    """Write the loss of every trained token of tokenized data under a checkpoint into the folder `output`.

    `training.score.TokenLosses` reads it.

    Raises:
        RunFailed: the scoring failed; the message begins with the traceback.
    """
    folder = resolve(output)
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--output", str(folder)]
    launch("rsft_lib.evaluation.score", arguments, nproc, folder.with_name(f"{folder.name}.log"))


def _refuse_others(job: Job, config: TrainConfig) -> None:
    try:
        runs, asked = read_record(job.folder / CONFIG), config.to_json()
    except ValueError as error:
        raise ValueError(
            f"{error}. A training runs in {job.folder} ({job.state}), and with which settings cannot be told: stop it "
            f"first (launch.attach({str(job.folder)!r}).stop()), or choose another output folder"
        ) from None
    differences = [f"{name}: runs with {runs.get(name)!r}, asked for {v!r}" for name, v in asked.items()
                   if runs.get(name) != v]  # fmt: skip
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"a training with other settings runs in {job.folder} ({job.state}):\n  {listed}\n"
            "Set these back to come back to it, stop it first, or choose another output folder."
        )


def _finished(config: TrainConfig, output: Path) -> bool:
    """Whether the run in a folder is this one, and has done all of the steps that are asked for.

    Its base checkpoint may have been removed since, if it still has the same name in the settings.

    Raises:
        FileNotFoundError: data are gone, or a base that was asked for, or from which more steps are to be trained.
        ValueError: it is another one; every difference is named.
    """
    told = read_ended(output)
    if told.get("reason") != "finished":
        return False
    checkpoint = checkpoint_folder(output, told["iteration"])
    if checkpoint not in checkpoints(output):
        return False
    from rsft_lib.training.datasets import open_datasets
    from rsft_lib.training.same_run import facts_of, refuse_another_run  # imports megatron-core, which takes seconds

    enough, data, recorded = told["iteration"] >= config.train_iters, open_datasets(config), read_manifest(checkpoint)
    try:
        facts = facts_of(config, data, existing(config.checkpoint, "checkpoint"))
    except FileNotFoundError:
        if not enough or resolve(config.checkpoint) != resolve(recorded.get("config", {}).get("checkpoint", "")):
            raise
        base = recorded.get("base_sha256", "")
        facts = {"config": config.to_json(), "data": data.facts(), "base_sha256": base}
    refuse_another_run(checkpoint, facts)
    return enough


def _with_steps(config: TrainConfig) -> TrainConfig:
    """The settings with `epochs`, where set, converted to `train_iters`."""
    if not config.epochs:
        return config
    from rsft_lib.training.datasets import open_datasets

    return config.for_packs(len(open_datasets(config).train))


def _refuse_elsewhere(output: Path) -> None:
    """A local run of another machine cannot be seen from here but by what it writes."""
    facts, log = read_job(output), output / LOG
    elsewhere = facts.get("launcher") == "local" and facts["host"] != socket.gethostname()
    written = max((path.stat().st_mtime for path in (log, output / "metrics.jsonl") if path.exists()), default=0)
    if elsewhere and not (output / ENDED).exists() and time.time() - written < FRESH:
        raise ValueError(
            f"a training in {output} was started on {facts['host']} and wrote {time.time() - written:.0f} s ago: stop "
            f"it there, or start again here when it has not written for {FRESH} s"
        )


def _clear(output: Path) -> None:
    """Remove what tells how the training before this one ended."""
    for name in (ENDED, STOPPING):
        (output / name).unlink(missing_ok=True)
    for name in (STACKS, ERRORS):
        shutil.rmtree(output / name, ignore_errors=True)
