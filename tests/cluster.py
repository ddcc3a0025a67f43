"""A Slurm cluster of two nodes on this machine: slurmctld, two slurmd and munged in a temporary folder."""

import getpass
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("sbatch", "slurmctld", "slurmd", "munged")
PATIENCE = 300  # seconds for each daemon to start or stop on a busy machine
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=p Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """The reason why no cluster can be started; empty if one can."""
    absent = [name for name in NEEDED if not _path(name)]
    return f"{', '.join(absent)} not installed: apt-get install slurm-wlm munge" if absent else ""


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")  # only in root's PATH


@contextmanager
def cluster() -> Iterator[None]:
    """Within the block, Slurm's commands use a cluster with the nodes n0 and n1."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path may have 107 characters
    before = os.environ.get("SLURM_CONF")
    try:
        _start(folder)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        _until(lambda: output_of("sinfo", "--noheader", "--format=%t").strip() == "idle", "both nodes are idle", folder)
        yield
    finally:
        output_of("scancel", "--user", getpass.getuser())
        _stop(folder)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        shutil.rmtree(folder, ignore_errors=True)


def output_of(*command: str) -> str:
    """The output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def _start(folder: Path) -> None:
    ports = random.sample(range(20_000, 32_000), 3)  # below the system's ephemeral ports
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=socket.gethostname(), user=getpass.getuser(), ports=ports))
    for name in ("state", "n0", "n1"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    files = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munge.log", "pid-file": "munged.pid"}
    files["seed-file"] = "munge.seed"
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([_path("munged"), "--force", *(f"--{k}={folder / v}" for k, v in files.items())], **quiet)
    subprocess.run([_path("slurmctld"), "-f", str(conf)], **quiet)
    for node in ("n0", "n1"):
        subprocess.run([_path("slurmd"), "-f", str(conf), "-N", node], **quiet)


def _stop(folder: Path) -> None:
    """Stop the nodes, with their jobs, and then the other daemons."""
    for name in ("n0", "n1", "slurmctld", "munged"):
        path = folder / f"{name}.pid"
        if path.exists():
            pid = int(path.read_text())
            os.kill(pid, signal.SIGTERM)
            _until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"{name} ends", folder)


def _until(condition, what: str, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-1000:]}" for path in folder.glob("*.log"))
            raise TimeoutError(f"{what}: not within {PATIENCE} s; sinfo shows {output_of('sinfo')!r}\n{logs}")
        time.sleep(0.1)
