"""End a process when its parent dies, for whatever reason.

    python -m rsft_lib.common.parent_death PID MODULE ARGUMENTS

runs a module so, started by the process PID.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def die_with_parent(parent: int = 0) -> None:
    """Have the kernel send SIGTERM to this process when its parent dies. Call it first.

    The signal may arrive more than once: the kernel sends it whenever the parent thread ends, and another becomes it.

    Args:
        parent: pid of the parent, if it may have died already.
    """
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    import runpy
    import sys

    sys.argv.pop(0)
    die_with_parent(int(sys.argv.pop(0)))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
