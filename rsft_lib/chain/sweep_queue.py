"""Runs the trials of a sweep, several at a time, each as `python -m rsft_lib.project run` in a process of its own.

What is done is not run again, and what was begun is resumed, as in any project. When this process ends for any reason,
so do the trials' processes and their kernels, and trainings save and end (`launch.torchrun`).
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import NamedTuple

from rsft_lib.chain.project_file import TRAIN
from rsft_lib.chain.steps import folder_of
from rsft_lib.chain.sweep import Trial
from rsft_lib.common.cores import usable_cores
from rsft_lib.common.locks import locked
from rsft_lib.display.live.run_card import duration
from rsft_lib.launch import attach

LOG = "run.log"
FAULTS = ("error: ", "not done: ")  # with these begins what `rsft_lib.project` says of a run that is not done
SHOWN = 400  # characters of a fault


class Running(NamedTuple):
    """A trial's process, the environment variables of its place in the queue, and when it began."""

    trial: Trial
    process: subprocess.Popen
    place: dict[str, str]
    began: float


def run_trials(trials: list[Trial], places: list[dict[str, str]]) -> dict[str, str]:
    """Run the trials that are not done, each in one of the places; a line is printed when one ends.

    Args:
        places: as `places_for` returns them.

    Returns:
        Trial -> why it is not done. One that fails does not end the sweep.
    """
    free, running, faults = list(places), list[Running](), dict[str, str]()
    with locked(trials[0].project.folder.parent):  # a second sweep waits and then finds the trials done
        waiting = [trial for trial in trials if trial.first_not_done()]
        print(f"{len(trials) - len(waiting)} of {len(trials)} trials were done before", flush=True)
        try:
            while waiting or running:
                while waiting and free:
                    running.append(_start(waiting.pop(0), free.pop(0)))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.place)
                    if fault := _fault(one):
                        faults[one.trial.project.name] = fault
                    left = f"{len(waiting)} waiting, {len(running)} running"
                    took = duration(time.monotonic() - one.began)
                    print(f"{one.trial.project.name}: {fault or 'done'} ({took}; {left})", flush=True)
                time.sleep(0.1)
        finally:
            for one in running:
                one.process.terminate()
            for one in running:
                one.process.wait()
    return faults


def places_for(trials: list[Trial], workers: int = 0) -> list[dict[str, str]]:
    """Where trials run at the same time: environment variables that give each its GPUs, or its share of the cores.

    A trial has as many GPUs, or CPU processes, as `nproc` of its training. Trainings that Slurm runs need none here.

    Args:
        workers: trials at a time; 0 for as many as there is room for.

    Raises:
        ValueError: there are not enough GPUs for so many.
    """
    settings = [trial.project.parameters[TRAIN] for trial in trials]
    if any(one.get("launcher") == "slurm" for one in settings):
        return [{}] * (workers or len(trials))
    ranks, gpus = max(one.get("nproc", 1) for one in settings), _gpus()
    if not gpus:
        count = min(workers or max(1, usable_cores() // ranks), len(trials))
        threads = max(1, usable_cores() // (count * ranks))
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * count
    room = max(1, len(gpus) // ranks)
    if workers > room:
        raise ValueError(f"workers is {workers}, but {len(gpus)} GPUs have room for {room}, each with nproc={ranks}")
    count = min(workers or room, len(trials))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * ranks : (i + 1) * ranks])} for i in range(count)]


def _gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # slow

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [*map(str, range(count))]


def _start(trial: Trial, place: dict[str, str]) -> Running:
    _wait_for_earlier(trial)
    first, last = trial.notebooks[0], trial.notebooks[-1]
    command = [
        sys.executable, "-m", "rsft_lib.common.parent_death", str(os.getpid()),
        "rsft_lib.project", "run", str(trial.project.file), "--from", first, "--to", last,
    ]  # fmt: skip
    with (trial.project.folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | place,
            start_new_session=True,  # an interrupt of the notebook is handled by this process
        )
    return Running(trial, process, place, time.monotonic())


def _wait_for_earlier(trial: Trial) -> None:
    """Wait for what a killed sweep left: the trial's process, and a training that still saves."""
    with locked(trial.project.folder / "executed"):
        pass
    with suppress(ValueError):  # the trial's own notebook reports it
        job = attach(folder_of(trial.project, TRAIN))
        while job and job.on_interrupt == "stop" and job.running:
            time.sleep(0.2)


def _fault(ended: Running) -> str:
    """Why a trial is not done; empty if it is."""
    if ended.process.returncode == 0:
        return ""
    log = ended.trial.project.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begins = [number for number, line in enumerate(lines) if line.startswith(FAULTS)]
    said = " ".join(lines[begins[-1] :]) if begins else f"exit code {ended.process.returncode}"
    return f"{said[:SHOWN]}; see {log}"
