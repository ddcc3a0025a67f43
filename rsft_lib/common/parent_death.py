"""End a process when its parent dies, for whatever reason."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies. Call it first.

    The signal may arrive more than once: the kernel sends it whenever the parent thread ends, and another becomes it.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)
