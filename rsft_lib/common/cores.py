"""The number of CPU cores this process may use: on shared machines and in containers, fewer than the machine has."""

import math
import os
from pathlib import Path

CONTROL_GROUPS = ("cgroup", "cgroup2")


def usable_cores() -> int:
    """Cores in the CPU affinity of this process (taskset, Slurm), capped by the quota of its control groups.

    A quota of 1.5 cores counts as 2. os.cpu_count() ignores both limits; os.process_cpu_count() of Python 3.13
    respects only the affinity.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota(proc: Path = Path("/proc/self")) -> float:
    """CPU quota of the control groups of this process, in cores; infinite without a limit.

    Quotas are hierarchical, so the smallest one of a group and its ancestors applies. `mountinfo` and `cgroup` name
    their folders (proc(5), cgroups(7)). Versions 1 and 2 are supported, also mixed.
    """
    try:
        mounts = [line.split() for line in (proc / "mountinfo").read_text(encoding="utf-8").splitlines()]
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return math.inf
    quotas = [math.inf]
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind not in CONTROL_GROUPS or kind == "cgroup" and "cpu" not in options.split(","):
            continue
        for _, controllers, group in groups:
            if controllers.split(",") == [""] if kind == "cgroup2" else "cpu" in controllers.split(","):
                quotas += _quotas(Path(fields[4]), os.path.relpath(group, fields[3]))
    return min(quotas)


def _quotas(mount: Path, group: str) -> list[float]:
    """Quotas of a group under a mount and of its ancestors; a group outside the mount is replaced by the mount root."""
    relative = Path() if group.startswith("..") else Path(group)
    return [_quota(mount / folder) for folder in (relative, *relative.parents)]


def _quota(folder: Path) -> float:
    """Quota / period: both in `cpu.max` (version 2), or one file each (version 1); 'max' and -1 mean no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
