"""torchrun that ends when who started it does: `python -m rsft_lib.launch.torchrun PID` and arguments of torchrun.

It must hear of that once, for a second SIGTERM makes torchrun leave its ranks before they have saved. The signal that
lifeline.py asks for comes again with every thread of the parent that ends, so here a thread looks for the parent.
"""

import os
import signal
import sys
import threading
import time


def end_after(parent: int) -> None:
    """Send this process SIGTERM once `parent` is not its parent, or no longer."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_after, args=[int(sys.argv.pop(1))], daemon=True).start()

    from torch.distributed.run import main

    main()
