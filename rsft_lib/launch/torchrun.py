"""torchrun that stops its ranks when its parent ends: `python -m rsft_lib.launch.torchrun PID PATIENCE` and arguments
of torchrun.

A thread polls the parent's pid. parent_death.py would send a signal for every thread of the parent that ends, and
torchrun mishandles a second SIGTERM.
"""

import os
import signal
import sys
import threading
import time

from rsft_lib.launch.local import ask_to_stop


def end_after(parent: int, patience: float) -> None:
    """When `parent` is no longer this process's parent, ask the ranks to stop; after `patience` seconds, torchrun."""
    while os.getppid() == parent:
        time.sleep(0.2)
    if ask_to_stop(os.getpid()):
        time.sleep(patience)  # torchrun ends with its ranks, and this thread with it
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_after, args=[int(sys.argv.pop(1)), float(sys.argv.pop(1))], daemon=True).start()

    from torch.distributed.run import main

    main()
