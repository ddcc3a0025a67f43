"""Start a training in a run folder, attach to a running one, or recognize a finished one."""

import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from rsft_lib.checkpoint.run_checkpoints import checkpoint_folder, checkpoints
from rsft_lib.common.artifact import read_manifest, write_json
from rsft_lib.common.locks import locked
from rsft_lib.common.paths import require_path, resolve
from rsft_lib.launch import local, slurm
from rsft_lib.launch.failure import ERRORS
from rsft_lib.launch.job import Common, Job, read_job
from rsft_lib.launch.local import LocalJob
from rsft_lib.launch.options import HERE, LaunchOptions
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.run_folder import CONFIG, ENDED, LOG, STOPPING, read_ended, read_record
from rsft_lib.training.watchdog import STACKS

FRESH = 120  # seconds since the last write after which a run on another machine is assumed to have ended


def start_training(config: TrainConfig, nproc: int, options: LaunchOptions = HERE) -> Job:
    """Start the training in the run folder `config.output`, or resume it from its newest checkpoint.

    Returns immediately. If the training is already running or has finished, nothing is started, and its job is
    returned.

    Args:
        nproc: ranks on each machine.

    Raises:
        FileNotFoundError: the checkpoint or the data is missing; nothing has been started.
        ValueError: the number of ranks does not fit the settings, another run is in the folder, or Slurm rejects the
            job. Nothing has been started.
    """
    config.data_parallel(options.ranks(nproc))
    if config.tensor_overlap and nproc % config.tensor_parallel:
        raise ValueError(
            "tensor_overlap needs the tensor-parallel ranks on one machine: "
            f"nproc={nproc} is not divisible by tensor_parallel={config.tensor_parallel}"
        )
    config, output = _with_steps(config), resolve(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / ".starting"):  # two notebooks must not both find no training and start one
        if job := attach(output):
            _refuse_others(job, config)
            print(f"already running, nothing was started: {job.state}", flush=True)
            return job
        common: Common = {
            "train_iters": config.train_iters, "on_interrupt": options.on_interrupt, "patience": config.save_timeout,
        }  # fmt: skip
        if _finished(config, output):
            print(
                f"already finished, nothing was started; for another run, use an output other than {output}", flush=True
            )
            return LocalJob(output, pid=0, birth="", **common)
        _refuse_elsewhere(output)
        for name in ("checkpoint", "data", "eval_data"):
            if path := getattr(config, name):
                require_path(path, name)
        for path in config.more_held_out().values():
            require_path(path, "eval_more")
        _clear(output)
        write_json(output / CONFIG, config.to_json())
        if options.launcher == "slurm":
            return slurm.submit(output, nproc, options, **common)
        return local.start(output, nproc, **common)


def attach(run: str | Path) -> Job | None:
    """The running or queued training of a run folder, whoever started it; None if there is none.

    Raises:
        ValueError: it is a Slurm job, and this machine has no Slurm.
    """
    facts = read_job(resolve(run))
    if not facts:
        return None
    find = {"local": local.find, "slurm": slurm.find}[facts.pop("launcher")]
    return find(resolve(run), facts)


def launch_training(config: TrainConfig, nproc: int, poll: Callable[[], None] | None = None) -> str:
    """Train on `nproc` ranks of this machine to the end, resuming if the run folder `config.output` has a checkpoint.

    On an interrupt, the ranks finish their step and save.

    Args:
        poll: called about once per second; None to print the steps as they are logged.

    Returns:
        Why the run ended: 'finished', or 'alarm', 'time limit', 'SIGINT' or 'SIGTERM' if it can be resumed.

    Raises:
        FileNotFoundError: the checkpoint or the data is missing; nothing has been started.
        ValueError: the number of ranks does not fit the settings; nothing has been started.
        RunFailed: the training failed; the message starts with the traceback.
    """
    output = resolve(config.output)
    poll = poll or _steps_printed(output / LOG)
    start_training(config, nproc).wait(poll)
    poll()
    return read_ended(output).get("reason", "")


def _steps_printed(log: Path) -> Callable[[], None]:
    """A function that prints the lines of steps that were added to a log since its last call."""
    position = log.stat().st_size if log.exists() else 0

    def poll() -> None:
        nonlocal position
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                complete = file.read().rpartition(b"\n")[0]
            position += len(complete)
            for line in complete.decode(errors="replace").splitlines():
                if re.match(r"step +\d+/", line):  # not the "step" of the estimate before it
                    print(line, flush=True)

    return poll


def _refuse_others(job: Job, config: TrainConfig) -> None:
    try:
        current, requested = TrainConfig.with_defaults(read_record(job.folder / CONFIG)), config.to_json()
    except ValueError as error:
        raise ValueError(
            f"{error}. A training with unknown settings runs in {job.folder} ({job.state}): stop it first "
            f"(launch.attach({str(job.folder)!r}).stop()), or choose another output folder"
        ) from None
    differences = [f"{name}: running with {current.get(name)!r}, requested {v!r}" for name, v in requested.items()
                   if current.get(name) != v]  # fmt: skip
    if differences:
        listed = "\n  ".join(differences)
        raise ValueError(
            f"a training with other settings runs in {job.folder} ({job.state}):\n  {listed}\n"
            "Restore these to attach to it, stop it first, or choose another output folder."
        )


def _finished(config: TrainConfig, output: Path) -> bool:
    """Whether the run in a folder has finished all requested steps with these settings.

    Its base checkpoint may have been removed since, if its path in the settings is unchanged.

    Raises:
        FileNotFoundError: the data is missing; or the base checkpoint is, and its path has changed or steps remain.
        ValueError: it is another run; every difference is listed.
    """
    ended = read_ended(output)
    if ended.get("reason") != "finished":
        return False
    checkpoint = checkpoint_folder(output, ended["iteration"])
    if checkpoint not in checkpoints(output):
        return False
    from rsft_lib.training.datasets import open_datasets
    from rsft_lib.training.same_run import facts_of, refuse_another_run  # imports torch, which takes seconds

    done, data, recorded = ended["iteration"] >= config.train_iters, open_datasets(config), read_manifest(checkpoint)
    try:
        facts = facts_of(config, data, require_path(config.checkpoint, "checkpoint"))
    except FileNotFoundError:
        if not done or resolve(config.checkpoint) != resolve(recorded.get("config", {}).get("checkpoint", "")):
            raise
        base = recorded.get("base_sha256", "")
        facts = {"config": config.to_json(), "data": data.facts(), "base_sha256": base}
    refuse_another_run(checkpoint, facts)
    return done


def _with_steps(config: TrainConfig) -> TrainConfig:
    """The settings with `epochs`, if set, converted to `train_iters`."""
    if not config.epochs:
        return config
    from rsft_lib.training.datasets import open_datasets

    return config.for_packs(len(open_datasets(config).train))


def _refuse_elsewhere(output: Path) -> None:
    """Refuse to start while a local run on another machine, detected by its recent writes, uses the folder."""
    facts, log = read_job(output), output / LOG
    elsewhere = facts.get("launcher") == "local" and facts["host"] != socket.gethostname()
    written = max((path.stat().st_mtime for path in (log, output / "metrics.jsonl") if path.exists()), default=0)
    if elsewhere and not (output / ENDED).exists() and time.time() - written < FRESH:
        raise ValueError(
            f"a training in {output} was started on {facts['host']} and last wrote {time.time() - written:.0f} s ago: "
            f"stop it there, or start here once it has not written for {FRESH} s"
        )


def _clear(output: Path) -> None:
    """Remove the records of how the previous start ended."""
    for name in (ENDED, STOPPING):
        (output / name).unlink(missing_ok=True)
    for name in (STACKS, ERRORS):
        shutil.rmtree(output / name, ignore_errors=True)
