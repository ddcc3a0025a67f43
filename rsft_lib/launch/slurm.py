"""Ranks on the machines of a cluster, as a batch job of Slurm.

The run folder, on a file system that the machines share, is all that the notebook and the ranks have in common. Slurm
starts every rank itself, so that its signals reach them: before the time limit the batch script has them save and puts
the job back into the queue, where it goes on as the same job.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rsft_lib.common.paths import ROOT
from rsft_lib.launch.failure import ERRORS
from rsft_lib.launch.job import ENVIRONMENT, TRAIN, Job
from rsft_lib.launch.log import MARK, mark
from rsft_lib.launch.options import LaunchOptions
from rsft_lib.training.run_folder import CONFIG, ENDED, JOB, LOG, STOPPING
from rsft_lib.training.watchdog import STACKS

ASK_EVERY = 10.0  # seconds; Slurm's controller answers everybody on the cluster
OVER = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
)  # fmt: skip
BROKEN = ("FAILED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
GONE = "gone"  # so long ago that Slurm has forgotten it
SCRIPT = """\
#!/bin/bash
{options}

run={run}
# Asked to stop while the machines were being made ready.
if [ -e "$run/{stopping}" ]; then exit {stopped}; fi
printf '\\n{mark} started %s\\n' "$(date '+%F %T')"
# What tells how it ended the last time.
rm -rf "$run/{ended}" "$run/{stacks}" "$run/{errors}"
mkdir "$run/{errors}"

# The ranks meet on the first machine, which is this one.
export MASTER_ADDR=$(hostname) MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-1}}}}
export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}}
{exports}

# Before the time limit the ranks are asked to save and end.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

cd {root}
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  export TORCHELASTIC_ERROR_FILE="$0/{errors}/rank$RANK.json"
  exec "$1" -m {module} --config "$0/{config}"' "$run" {python} &
ranks=$!
wait $ranks; code=$?
while kill -0 $ranks 2>/dev/null; do wait $ranks; code=$?; done  # a signal interrupts `wait`

# What was stopped and saved is not done, for jobs that wait until it is; before the time limit it is queued again.
if [ $code = 0 ] && ! grep -qs '"finished"' "$run/{ended}"; then
  code={stopped}
  if [ "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit $code
"""

_STOP = (("--quiet", "--state=PENDING"), ("--quiet", "--signal=TERM"))  # options of scancel, one after the other
# A process that has a job stop when this one has ended, however: what it reads then is the end of a file.
_GUARD = """
read -r _ || [ -e "$0" ] || { touch "$0"; scancel --quiet --state=PENDING "$1"; scancel --quiet --signal=TERM "$1"; }
"""
_guards: dict[str, subprocess.Popen] = {}  # by job; their ends of the pipes close with this process


def submit(folder: Path, nproc: int, options: LaunchOptions, **common) -> "SlurmJob":
    """Write the batch script for the settings in `folder/config.json`, and submit it.

    Raises:
        ValueError: there is no Slurm here, or it refuses the job; the message says why.
    """
    job = SlurmJob(folder, "", **common)
    script = folder / "job.sbatch"
    script.write_text(batch_script(folder, nproc, options), encoding="utf-8")
    mark(job.log, "submitted")
    done = _slurm("sbatch", "--parsable", str(script))
    if done.returncode:
        raise ValueError(f"Slurm refuses {script}: {done.stderr.strip()}")
    job.id = done.stdout.strip().split(";")[0]
    job.remember(id=job.id)
    if options.on_interrupt == "stop":
        _watch_over(job)
    return job


def find(folder: Path, facts: dict) -> "SlurmJob | None":
    """The job that `facts` tell of, unless it is over.

    Raises:
        ValueError: this machine has no Slurm to ask.
    """
    job = SlurmJob(folder, **facts)
    if shutil.which("scontrol"):
        return job if job.running else None
    if job.ended.get("reason") == "finished":
        return None
    raise ValueError(
        f"{folder} belongs to Slurm job {job.id}, and this machine has no Slurm to ask whether it still runs; "
        f"look from a login node, or remove {folder / JOB} if it does not"
    )


def batch_script(folder: Path, nproc: int, options: LaunchOptions) -> str:
    """The script that trains in `folder` with `nproc` ranks on each machine.

    Raises:
        ValueError: a path would break out of its line.
    """
    for what, text in {"output": str(folder), "the project's folder": str(ROOT), "Python": sys.executable}.items():
        if not text.isprintable() or "\\" in text:  # within quotes too Slurm takes a backslash for a sign of its own
            raise ValueError(f"{what} is {text!r}; Slurm needs a path of printable characters, and no backslash")
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
        options="\n".join(given), exports=exports, run=shlex.quote(str(folder)), root=shlex.quote(str(ROOT)),
        python=shlex.quote(sys.executable), module=TRAIN, stopping=STOPPING, ended=ENDED, stacks=STACKS, errors=ERRORS,
        config=CONFIG, mark=MARK, stopped=os.EX_TEMPFAIL,
    )  # fmt: skip


class SlurmJob(Job):
    """A training that Slurm runs, or will."""

    launcher = "slurm"

    def __init__(self, folder: Path, id: str, **common):
        super().__init__(folder, **common)
        self.id, self.facts, self.asked, self.told = id, {}, 0.0, ""

    @property
    def running(self) -> bool:
        """Whether Slurm still has something to do with it: it may also wait in the queue."""
        self._ask(1.0 if self._just_ended() else ASK_EVERY)
        over = self.facts.get("JobState") in (*OVER, GONE)
        if over:
            _let_go(self.id)
        return not over

    @property
    def state(self) -> str:
        """In Slurm's words, with what a job that waits is waiting for, and the machines of one that runs."""
        self._ask(ASK_EVERY)
        if self._stopped():
            return f"Slurm job {self.id}: stopped"
        facts = {"JobState": "submitted"} | self.facts
        reason, nodes = (facts.get(name, "") for name in ("Reason", "NodeList"))
        text = f"Slurm job {self.id}: {facts['JobState'].lower()}"
        text += f" ({reason})" if reason not in ("", "None") else ""
        return text + (f" on {nodes}" if nodes not in ("", "(null)") else "")

    def stop(self) -> None:
        """Ask all ranks to save after the step that runs, and end; a job that still waits is taken from the queue."""
        (self.folder / STOPPING).touch()
        for arguments in _STOP:
            _slurm("scancel", *arguments, self.id)
        self.asked = 0.0

    def kill(self) -> None:
        """End it at once, whatever it does."""
        _slurm("scancel", self.id)
        self.asked = 0.0

    def _failed(self) -> bool:
        return super()._failed() or (self.facts.get("JobState") in BROKEN and not self._stopped())

    def _stopped(self) -> bool:
        """Whether it ended as SCRIPT does where ranks were asked to stop: for Slurm it failed."""
        return self.facts.get("JobState") == "FAILED" and self.facts.get("ExitCode") == f"{os.EX_TEMPFAIL}:0"

    def _pause(self) -> None:
        if self.state != self.told:
            self.told = self.state
            print(self.told, flush=True)
        super()._pause()

    def _ask(self, every: float) -> None:
        if time.monotonic() - self.asked < every:
            return
        self.asked = time.monotonic()
        done = _slurm("scontrol", "show", "job", "--oneliner", self.id)
        if done.returncode == 0:
            words = [word.split("=", 1) for word in done.stdout.split() if "=" in word]
            self.facts = dict(reversed(words))  # the first counts: those of a path with spaces come after its state
        elif "Invalid job id" in done.stderr:
            self.facts = self._remembered()
        else:
            self.facts = {**self.facts, "Reason": done.stderr.strip() or "Slurm does not answer"}

    def _just_ended(self) -> bool:
        path = self.folder / ENDED
        return path.exists() and time.time() - path.stat().st_mtime < 30

    def _remembered(self) -> dict[str, str]:
        """The state of a job that ended some minutes ago, where the cluster keeps accounts."""
        asked = ("--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
        done = _slurm("sacct", "--jobs", self.id, *asked)
        state, _, code = done.stdout.partition("\n")[0].partition("|")
        found = state.split()  # CANCELLED is followed by who did it
        return {"JobState": found[0], "ExitCode": code} if done.returncode == 0 and found else {"JobState": GONE}


def _watch_over(job: SlurmJob) -> None:
    arguments = ["sh", "-c", _GUARD, str(job.folder / STOPPING), job.id]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    _guards[job.id] = subprocess.Popen(arguments, stdin=subprocess.PIPE, start_new_session=True, **quiet)


def _let_go(job: str) -> None:
    if guard := _guards.pop(job, None):
        guard.communicate(b"over\n")


def _has_gpus(options: LaunchOptions) -> bool:
    """Whether to ask for GPUs: the partition has some, and the user has not asked in words of their own."""
    partition = ["--partition", options.slurm_partition] if options.slurm_partition else []
    told = _slurm("sinfo", "--noheader", "--format=%G", *partition).stdout
    return "gpu" in told and "gpu" not in options.slurm_options and "gres" not in options.slurm_options


def _slurm(*command: str) -> subprocess.CompletedProcess:
    """Run one of Slurm's commands; its answer, also where it fails or there is none.

    Raises:
        ValueError: there is no Slurm here.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        raise ValueError(
            f"launcher is 'slurm', but there is no {command[0]} here: start on a login node of the cluster, or set "
            "launcher to 'local'"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within 30 s")
