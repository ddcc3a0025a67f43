"""A process that ends when its parent does, however the parent went."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # prctl(2), Linux


def die_with_parent() -> None:
    """Have this process sent SIGTERM as soon as its parent is gone. Call it first of all.

    It may come more than once: as each thread of the parent ends, another becomes the parent.
    """
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went while we asked
        os.kill(os.getpid(), signal.SIGTERM)
