"""How many cores a process may use: pytest tests/test_cores.py"""

import math
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from rsft_lib.cores import cpu_quota, usable_cores

TWO, ONE = ("cgroup2", "cgroup", "rw"), ("cgroup", "cgroup", "rw,cpu,cpuacct")


def system(folder: Path, mount: tuple[str, ...], root: str, group: str, files: dict[str, str]) -> Path:
    """A /proc/self whose process is in `group` of control groups that are mounted in `folder` from `root` on."""
    line = f"30 23 0:26 {root} {folder / 'cgroup'} rw,nosuid shared:4 - {' '.join(mount)}\n"
    (folder / "mountinfo").write_text(f"22 1 8:1 / / rw - ext4 /dev/root rw\n{line}")
    (folder / "cgroup").mkdir()
    for name, content in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    proc = folder / "self"
    proc.mkdir()
    (folder / "mountinfo").rename(proc / "mountinfo")
    controllers = "" if mount == TWO else "cpu,cpuacct"
    (proc / "cgroup").write_text(f"9:cpuset:/elsewhere\n0:{controllers}:{group}\n")
    return proc


@pytest.mark.parametrize(
    ("mount", "root", "group", "files", "quota"),
    [
        (TWO, "/", "/", {"cpu.max": "400000 100000\n"}, 4),  # Docker with a namespace of its own, Kubernetes
        (TWO, "/", "/", {"cpu.max": "max 100000\n"}, math.inf),
        (TWO, "/", "/", {}, math.inf),  # no controller of CPU time
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
def test_the_quota_is_the_least_of_the_groups_that_a_process_is_in(tmp_path, mount, root, group, files, quota):
    assert cpu_quota(system(tmp_path, mount, root, group, files)) == quota


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


def make_group() -> tuple[Path, dict[str, str]]:
    """A control group of this machine's own, and what grants it half a core; skips where none can be made."""
    for folder, files in [
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
    ]:
        group = Path(folder, f"rsft-test-{uuid.uuid4().hex[:8]}")
        try:
            group.mkdir()
        except OSError:
            continue
        if all((group / name).exists() for name in files):
            return group, files
        group.rmdir()
    pytest.skip("this user can make no control group for CPU time here")


def test_a_real_quota_is_seen_by_a_process_in_its_group():
    group, files = make_group()
    code = "import os; open('{}/cgroup.procs', 'w').write(str(os.getpid())); " + (
        "from rsft_lib.cores import cpu_quota, usable_cores; print(cpu_quota(), usable_cores())"
    )
    try:
        for name, content in files.items():
            (group / name).write_text(content)
        done = subprocess.run([sys.executable, "-c", code.format(group)], capture_output=True, text=True)
        assert done.stdout == "0.5 1\n", done
    finally:
        group.rmdir()
