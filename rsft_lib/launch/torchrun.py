"""torchrun whose ranks are stopped when who started it ends: `python -m rsft_lib.launch.torchrun PID PATIENCE` and
arguments of torchrun.

The signal that parent_death.py asks for comes again with every thread of the parent that ends, and torchrun
mishandles a second SIGTERM, so here a thread looks for the parent.
"""

import os
import signal
import sys
import threading
import time

from rsft_lib.launch.local import ask_to_stop


def end_after(parent: int, patience: float) -> None:
    """Once `parent` is not this process's parent, or no longer, ask the ranks to stop, and after `patience` insist."""
    while os.getppid() == parent:
        time.sleep(0.2)
    if ask_to_stop(os.getpid()):
        time.sleep(patience)  # torchrun ends with its ranks, and this thread with it
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_after, args=[int(sys.argv.pop(1)), float(sys.argv.pop(1))], daemon=True).start()

    from torch.distributed.run import main

    main()
