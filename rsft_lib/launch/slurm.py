"""Ranks on a cluster: writes `job.sbatch`, submits it and follows the Slurm job.

The notebook and the ranks only share the run folder, on a shared file system. Slurm starts every rank itself, so that
its signals reach them: before the time limit, the batch script has the ranks save and requeues the job, which resumes
under the same job id.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Unpack

from rsft_lib.launch.failure import ERRORS
from rsft_lib.launch.job import ENVIRONMENT, TRAIN, Common, Job
from rsft_lib.launch.log import MARK, mark
from rsft_lib.launch.options import LaunchOptions
from rsft_lib.training.run_folder import CONFIG, ENDED, JOB, LOG, STOPPING
from rsft_lib.training.watchdog import STACKS

ASK_EVERY = 10.0  # seconds between queries, to limit the load on Slurm's controller
OVER = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
)  # fmt: skip
BROKEN = ("FAILED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
GONE = "gone"  # ended so long ago that Slurm no longer knows it
SCRIPT = """\
#!/bin/bash
{options}

run={run}
# Exit if the run was asked to stop while the job was starting.
if [ -e "$run/{stopping}" ]; then exit {stopped}; fi
printf '\\n{mark} started %s\\n' "$(date '+%F %T')"
# Remove the records of how the previous start ended.
rm -rf "$run/{ended}" "$run/{stacks}" "$run/{errors}"
mkdir "$run/{errors}"

# The rendezvous is on the first node, which is this one.
export MASTER_ADDR=$(hostname) MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
{exports}

# Before the time limit, ask the ranks to save and end.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

cd {root}
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export TORCHELASTIC_ERROR_FILE="$0/{errors}/rank$RANK.json"
  exec "$1" -m {module} --config "$0/{config}"' "$run" {python} &
ranks=$!
wait $ranks; code=$?
while kill -0 $ranks 2>/dev/null; do wait $ranks; code=$?; done  # a signal interrupts `wait`

# A run that was stopped must not succeed, for jobs that depend on it; at the time limit it is requeued.
if [ $code = 0 ] && ! grep -qs '"finished"' "$run/{ended}"; then
  code={stopped}
  if [ "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit $code
"""

_STOP = (("--quiet", "--state=PENDING"), ("--quiet", "--signal=TERM"))  # options of consecutive scancel calls
# A process that stops a job when this process ends for any reason, which closes the pipe that it reads.
_GUARD = """
read -r _ || [ -e "$0" ] || { touch "$0"; scancel --quiet --state=PENDING "$1"; scancel --quiet --signal=TERM "$1"; }
"""
_guards: dict[str, subprocess.Popen] = {}  # by job id


def submit(folder: Path, nproc: int, options: LaunchOptions, **common: Unpack[Common]) -> "SlurmJob":
    """Write the batch script for the settings in `folder/config.json`, and submit it.

    Raises:
        ValueError: this machine has no Slurm, or Slurm rejects the job; the message has its reason.
    """
    job = SlurmJob(folder, "", **common)
    script = folder / "job.sbatch"
    script.write_text(batch_script(folder, nproc, options), encoding="utf-8")
    mark(job.log, "submitted")
    done = _slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        raise ValueError(f"Slurm rejects {script}: {done.stderr.strip()}")
    job.id = done.stdout.strip().split(";")[0]
    job.remember(id=job.id)
    if options.on_interrupt == "stop":
        _start_guard(job)
    return job


def find(folder: Path, facts: dict) -> "SlurmJob | None":
    """The job with these `facts`, unless it has ended.

    Raises:
        ValueError: this machine has no Slurm.
    """
    job = SlurmJob(folder, **facts)
    if shutil.which("scontrol"):
        return job if job.running else None
    if job.ended.get("reason") == "finished":
        return None
    raise ValueError(
        f"{folder} belongs to Slurm job {job.id}, and this machine has no Slurm to check whether it still runs; "
        f"check on a login node, and remove {folder / JOB} if it does not"
    )


def batch_script(folder: Path, nproc: int, options: LaunchOptions) -> str:
    """The script that trains in `folder` with `nproc` ranks on each node.

    Raises:
        ValueError: a path has characters that Slurm does not support.
    """
    for what, path in {
        "output": str(folder),
        "the working directory": str(Path.cwd()),
        "Python": sys.executable,
    }.items():
        if not path.isprintable() or "\\" in path:  # Slurm interprets backslashes even within quotes
            raise ValueError(f"{what} is {path!r}; Slurm needs a path of printable characters without backslashes")
    lines = {
        "job-name": re.sub(r"[^\w.+-]", "_", folder.name),
        "nodes": options.slurm_nodes,
        "ntasks-per-node": nproc,
        "partition": options.slurm_partition,
        "time": options.slurm_time,
        "gpus-per-node": nproc if _has_gpus(options) else "",
        "output": str(folder / LOG).replace("%", "%%"),
        "open-mode": "append",
        "requeue": None,
        "signal": f"B:USR1@{options.slurm_ahead}",
    }
    given = [f"#SBATCH --{name}" + (f"={shlex.quote(str(v))}" if v else "") for name, v in lines.items() if v != ""]
    if options.slurm_options:
        given.append(f"#SBATCH {options.slurm_options}")
    exports = "\n".join(f"export {name}=${{{name}:-{value}}}" for name, value in ENVIRONMENT.items())
    return SCRIPT.format(
        options="\n".join(given), exports=exports, run=shlex.quote(str(folder)), root=shlex.quote(str(Path.cwd())),
        python=shlex.quote(sys.executable), module=TRAIN, stopping=STOPPING, ended=ENDED, stacks=STACKS, errors=ERRORS,
        config=CONFIG, mark=MARK, stopped=os.EX_TEMPFAIL,
    )  # fmt: skip


class SlurmJob(Job):
    """A training that Slurm runs or has queued."""

    launcher = "slurm"

    def __init__(self, folder: Path, id: str, **common: Unpack[Common]):
        super().__init__(folder, **common)
        self.id, self.queried, self.printed = id, 0.0, ""
        self.facts: dict[str, str] = {}

    @property
    def running(self) -> bool:
        """Whether it has not ended; it may still be in the queue."""
        self._query(1.0 if self._just_ended() else ASK_EVERY)
        over = self.facts.get("JobState") in (*OVER, GONE)
        if over:
            _remove_guard(self.id)
        return not over

    @property
    def state(self) -> str:
        """Slurm's job state, with the reason of a pending job and the nodes of a running one."""
        self._query(ASK_EVERY)
        if self._stopped():
            return f"Slurm job {self.id}: stopped"
        facts = {"JobState": "submitted"} | self.facts
        reason, nodes = (facts.get(name, "") for name in ("Reason", "NodeList"))
        text = f"Slurm job {self.id}: {facts['JobState'].lower()}"
        text += f" ({reason})" if reason not in ("", "None") else ""
        return text + (f" on {nodes}" if nodes not in ("", "(null)") else "")

    def stop(self) -> None:
        """Ask all ranks to save after the current step and end; a pending job is removed from the queue."""
        (self.folder / STOPPING).touch()
        for arguments in _STOP:
            _slurm("scancel", *arguments, self.id)
        self.queried = 0.0

    def kill(self) -> None:
        """Cancel it without saving."""
        _slurm("scancel", self.id)
        self.queried = 0.0

    def _failed(self) -> bool:
        return super()._failed() or (self.facts.get("JobState") in BROKEN and not self._stopped())

    def _stopped(self) -> bool:
        """Whether it ended with SCRIPT's exit code for a requested stop, which is a failure for Slurm."""
        return self.facts.get("JobState") == "FAILED" and self.facts.get("ExitCode") == f"{os.EX_TEMPFAIL}:0"

    def _pause(self) -> None:
        if self.state != self.printed:
            self.printed = self.state
            print(self.printed, flush=True)
        super()._pause()

    def _query(self, every: float) -> None:
        """Update `facts` unless they are less than `every` seconds old."""
        if time.monotonic() - self.queried < every:
            return
        self.queried = time.monotonic()
        done = _slurm("scontrol", "show", "job", "--oneliner", self.id)
        if done.returncode == 0:
            fields = [field.split("=", 1) for field in done.stdout.split() if "=" in field]
            self.facts = dict(reversed(fields))  # the first of equal names counts: paths with spaces follow the state
        elif "Invalid job id" in done.stderr:
            self.facts = self._accounted()
        else:
            self.facts = {**self.facts, "Reason": done.stderr.strip() or "Slurm does not answer"}

    def _just_ended(self) -> bool:
        path = self.folder / ENDED
        return path.exists() and time.time() - path.stat().st_mtime < 30

    def _accounted(self) -> dict[str, str]:
        """The state from Slurm's accounting, if there is any, for a job that the controller no longer knows."""
        options = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        done = _slurm("sacct", "--jobs", self.id, *options)
        state, _, code = done.stdout.partition("\n")[0].partition("|")
        parts = state.split()  # CANCELLED is followed by the user
        return {"JobState": parts[0], "ExitCode": code} if done.returncode == 0 and parts else {"JobState": GONE}


def _start_guard(job: SlurmJob) -> None:
    arguments = ["sh", "-c", _GUARD, str(job.folder / STOPPING), job.id]
    _guards[job.id] = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _remove_guard(job: str) -> None:
    if guard := _guards.pop(job, None):
        guard.communicate(b"over\n")


def _has_gpus(options: LaunchOptions) -> bool:
    """Whether to request GPUs: the partition has some, and slurm_options does not request any."""
    partition = ["--partition", options.slurm_partition] if options.slurm_partition else []
    resources = _slurm("sinfo", "--noheader", "--format=%G", *partition).stdout
    return "gpu" in resources and "gpu" not in options.slurm_options and "gres" not in options.slurm_options


def _slurm(*command: str) -> subprocess.CompletedProcess:
    """Run a Slurm command; failures and timeouts are returned, not raised.

    Raises:
        ValueError: this machine has no Slurm.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise ValueError(
            f"launcher is 'slurm', but this machine has no {command[0]}: run on a login node of the cluster, or set "
            "launcher to 'local'"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within 30 s")
