"""torchrun whose ranks are stopped when who started it ends: `python -m rsft_lib.launch.torchrun PID PATIENCE` and
arguments of torchrun.

The ranks are asked, and not torchrun, which up to torch 2.11 kills ranks that have not saved within 30 seconds, and at
a second SIGTERM at once. The signal that lifeline.py asks for comes again with every thread of the parent that ends, so
here a thread looks for the parent.
"""

import os
import signal
import sys
import threading
import time

import psutil


def ask_to_stop(torchrun: int) -> bool:
    """Send SIGTERM to the ranks under a torchrun, or to itself where it has none yet; whether it had any.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    process = psutil.Process(torchrun)
    ranks = process.children()
    for one in ranks or [process]:
        one.send_signal(signal.SIGTERM)
    return bool(ranks)


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
