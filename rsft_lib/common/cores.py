"""How many cores this process may use, which on a shared machine or in a container are fewer than there are."""

import math
import os
from pathlib import Path

CONTROL_GROUPS = ("cgroup", "cgroup2")


def usable_cores() -> int:
    """Cores of this process: those of its affinity (taskset, Slurm), or fewer where a control group's quota is less.

    A quota of one and a half cores counts as two. os.cpu_count() knows neither, os.process_cpu_count() of Python 3.13
    knows the affinity alone.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), cpu_quota())))


def cpu_quota(proc: Path = Path("/proc/self")) -> float:
    """CPU seconds a second that the control groups of this process grant it; infinite without a limit.

    A group has no more than the groups that it is in, so the least of all counts. Where they lie is told by
    `mountinfo` and `cgroup` (proc(5), cgroups(7)); version 1 and 2, also side by side.
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
    """The quota of a group under a mount, and of each group that it is in; of what is not seen from here, none."""
    inside = Path() if group.startswith("..") else Path(group)
    return [_quota(mount / folder) for folder in (inside, *inside.parents)]


def _quota(folder: Path) -> float:
    """Quota over period: version 2 has both in `cpu.max`, version 1 a file for each; 'max' and -1 are no limit."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota.strip() in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
