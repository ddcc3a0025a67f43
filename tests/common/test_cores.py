"""The number of cores that a process may use."""

import math
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from rsft_lib.common.cores import cpu_quota, usable_cores

TWO, ONE = ("cgroup2", "cgroup", "rw"), ("cgroup", "cgroup", "rw,cpu,cpuacct")


def system(folder: Path, *hierarchies: tuple) -> Path:
    """A fake /proc/self of a process in one group of each hierarchy, given as (mount, root, group, files).

    The subtree `root` of a hierarchy is mounted in `folder` and contains `files`.
    """
    mounts, groups = "22 1 8:1 / / rw - ext4 /dev/root rw\n", "9:cpuset:/elsewhere\n"
    for number, (mount, root, group, files) in enumerate(hierarchies):
        top = folder / f"cgroup{number}"
        mounts += f"30 23 0:26 {root} {top} rw,nosuid shared:4 - {' '.join(mount)}\n"
        groups += f"{number}:{'' if mount == TWO else 'cpu,cpuacct'}:{group}\n"
        for name, content in files.items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    proc = folder / "self"
    proc.mkdir()
    (proc / "mountinfo").write_text(mounts)
    (proc / "cgroup").write_text(groups)
    return proc


@pytest.mark.parametrize(
    ("mount", "root", "group", "files", "quota"),
    [
        (TWO, "/", "/", {"cpu.max": "400000 100000\n"}, 4),  # Docker with its own namespace, Kubernetes
        (TWO, "/", "/", {"cpu.max": "max 100000\n"}, math.inf),
        (TWO, "/", "/", {}, math.inf),  # no CPU controller
        (TWO, "/", "/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),  # Slurm
        (TWO, "/", "/job/step", {"job/cpu.max": "800000 100000", "job/step/cpu.max": "20000 10000"}, 2),
        (TWO, "/", "/other", {"job/cpu.max": "100000 100000"}, math.inf),
        (ONE, "/docker/12ab", "/docker/12ab", {"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 2.5),
        (ONE, "/docker/12ab", "/", {"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 2.5),
        (ONE, "/", "/a", {"a/cpu.cfs_quota_us": "-1\n", "a/cpu.cfs_period_us": "100000\n"}, math.inf),
        (ONE, "/", "/a/b", {"a/cpu.cfs_quota_us": "300000", "a/cpu.cfs_period_us": "100000"}, 3),
        (ONE, "/", "/a", {"a/cpu.cfs_quota_us": "nonsense", "a/cpu.cfs_period_us": "0"}, math.inf),
        (("cgroup", "cgroup", "rw,memory"), "/", "/", {"cpu.cfs_quota_us": "1", "cpu.cfs_period_us": "1"}, math.inf),
    ],
)
def test_the_quota_is_the_smallest_of_a_group_and_its_ancestors(tmp_path, mount, root, group, files, quota):
    assert cpu_quota(system(tmp_path, (mount, root, group, files))) == quota


@pytest.mark.parametrize(
    ("one", "two", "quota"), [(3, 2, 2), (2, 3, 2), (3, "max", 3), (-1, 3, 3), (-1, "max", math.inf)]
)
def test_with_both_versions_the_smaller_quota_applies(tmp_path, one, two, quota):
    """The process is in /a of version 1 and in /b of version 2, and not in the groups with the names swapped."""
    first = {"a/cpu.cfs_quota_us": str(one), "b/cpu.cfs_quota_us": "1"}
    first |= {"a/cpu.cfs_period_us": "1", "b/cpu.cfs_period_us": "1"}
    second = {"a/cpu.max": "1 1", "b/cpu.max": f"{two} 1"}
    assert cpu_quota(system(tmp_path, (ONE, "/", "/a", first), (TWO, "/", "/b", second))) == quota


def test_where_there_are_no_control_groups_there_is_no_quota(tmp_path):
    assert cpu_quota(tmp_path) == math.inf


def test_cores_that_the_process_may_not_run_on_are_not_counted():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert 1 <= usable_cores() <= len(mine)


@pytest.mark.parametrize(("quota", "cores"), [(0.1, 1), (1, 1), (1.5, 2), (2, 2), (3.01, 4), (9, 4), (math.inf, 4)])
def test_the_quota_is_rounded_up_and_capped_by_the_affinity(monkeypatch, quota, cores):
    monkeypatch.setattr("rsft_lib.common.cores.cpu_quota", lambda: quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 7})
    assert usable_cores() == cores


def make_group() -> tuple[Path, dict[str, str]]:
    """A real control group, and the files that limit it to half a core; skips if none can be created."""
    tried = []
    for folder, files in [
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
    ]:
        group = Path(folder, f"rsft-test-{uuid.uuid4().hex[:8]}")
        try:
            group.mkdir()
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        if all((group / name).exists() for name in files):
            return group, files
        group.rmdir()
        tried.append(f"{folder}: a group there has no {next(iter(files))}")
    pytest.skip(f"no control group for CPU time can be made here: {'; '.join(tried)}")


def test_a_real_quota_is_seen_by_a_process_in_its_group():
    group, files = make_group()
    code = "import os; open('{}/cgroup.procs', 'w').write(str(os.getpid())); " + (
        "from rsft_lib.common.cores import cpu_quota, usable_cores; print(cpu_quota(), usable_cores())"
    )
    try:
        for name, content in files.items():
            (group / name).write_text(content)
        done = subprocess.run([sys.executable, "-c", code.format(group)], capture_output=True, text=True)
        assert done.stdout == "0.5 1\n", done
    finally:
        group.rmdir()
