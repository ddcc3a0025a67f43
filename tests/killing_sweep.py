"""Repeatedly kill a sweep at random moments and resume it: python tests/killing_sweep.py --kills 20

No trial that is done may run again, no process may be left, and every trial must end like that of an undisturbed sweep:
the same weights, optimizer states and metrics, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from killing import differences
from processes import survivors, wait_until
from support import ROOT, random_store, tiny_model

from rsft_lib.checkpoint.convert import convert
from rsft_lib.training.metrics import read_metrics

STEPS = 16
VARY = {"lr": [1e-3, 2e-3, 4e-3], "seed": [1, 2, 3, 4]}
PATIENCE = 900  # seconds for processes to end; the machine may be busy
WAYS = ("SIGKILL to the sweep", "SIGKILL to all processes", "SIGTERM to the sweep")


def project(folder: Path, name: str, vary: dict | list | None = None, steps: int = STEPS, **training) -> Path:
    """The file of a project whose training takes seconds and saves often; its inputs are made once."""
    if not (folder / "store").exists():
        tiny_model(folder / "hf", hidden_size=32, intermediate_size=32, num_hidden_layers=2)
        convert(folder / "hf", folder / "megatron")
        random_store(folder / "store", samples=80, longest=30)
        random_store(folder / "held_out", samples=10, longest=30, seed=1)
    settings = {
        "checkpoint": str(folder / "megatron"), "data": str(folder / "store"), "eval_data": str(folder / "held_out"),
        "seq_length": 48, "global_batch_size": 2, "train_iters": steps, "save_interval": 4, "keep_last": 1,
        "eval_interval": steps, "precision": "fp32", "nproc": 1, **training,
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"05_train": settings, "09_sweep": {"vary": json.dumps(vary or VARY)}}))
    return file


def start(file: Path) -> subprocess.Popen:
    """The command that runs or resumes the sweep of a project."""
    command = [sys.executable, "-m", "rsft_lib.project", "run", str(file), "--from", "09", "--to", "09"]
    temporary = file.parent / "temporary"  # named in the kernels' command lines, so that none is overlooked
    temporary.mkdir(exist_ok=True)
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    with (file.parent / f"{file.stem}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=log, start_new_session=True)


def kill(process: subprocess.Popen, way: str) -> None:
    below = psutil.Process(process.pid).children(recursive=True) if "all" in way else []
    process.send_signal(signal.SIGTERM if "SIGTERM" in way else signal.SIGKILL)
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait(PATIENCE)


def finished(file: Path) -> dict[str, str]:
    """Trial -> when its training was done."""
    trials = file.with_suffix("") / "09_sweep" / "trials"
    records = {path.parts[-3]: json.loads(path.read_text()) for path in trials.glob("*/05_train/status.json")}
    return {name: record["finished"] for name, record in records.items() if record["status"] == "done"}


def runs(file: Path) -> dict[str, Path]:
    """Trial -> its run folder."""
    return {path.parent.name: path for path in (file.with_suffix("") / "09_sweep" / "trials").glob("*/05_train")}


def survive(folder: Path, kills: int, vary: dict, seed: int) -> None:
    """Run an undisturbed sweep, and another that is killed `kills` times.

    Raises:
        AssertionError: a trial that was done ran again, a process was left, or a trial ended differently.
    """
    whole, killed, began = project(folder, "whole", vary), project(folder, "killed", vary), time.monotonic()
    assert start(whole).wait() == 0, (folder / "whole.log").read_text()[-3000:]
    kill_often(killed, kills, 2 * (time.monotonic() - began) / len(runs(whole)), random.Random(seed))
    compare(runs(killed), runs(whole))


def kill_often(file: Path, kills: int, seconds: float, rng: random.Random) -> None:
    """Kill the sweep of a project at random moments, then let it end; `seconds` is the time of two trials."""
    before: dict[str, str] = {}
    for number in range(kills + 1):
        process, way = start(file), WAYS[number % len(WAYS)]
        if number < kills:
            time.sleep(rng.uniform(0, 1.5) * seconds)
            kill(process, way)
        else:
            assert process.wait() == 0, file.with_suffix(".log").read_text()[-3000:]
        wait_until(lambda: not survivors(file.parent), PATIENCE, f"left by {way}", file.with_suffix(".log"))
        assert before.items() <= finished(file).items(), "a trial that was done ran again"
        before = finished(file)
        print(f"{number}: {way if number < kills else 'the end'}, {len(before)} trials done", flush=True)


def compare(found: dict[str, Path], expected: dict[str, Path]) -> None:
    assert found.keys() == expected.keys()
    for name, run in found.items():
        assert differences(run, expected[name]) == [], name
        assert [record["iteration"] for record in read_metrics(run)] == [*range(1, STEPS + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began, count = time.monotonic(), len(VARY["lr"]) * len(VARY["seed"])
    with tempfile.TemporaryDirectory() as folder:
        survive(Path(folder), arguments.kills, VARY, arguments.seed)
    took = f"{time.monotonic() - began:.0f} s"
    print(f"{arguments.kills} kills in {took}: {count} trials, none run twice, equal to the undisturbed")


if __name__ == "__main__":
    sys.exit(main())
