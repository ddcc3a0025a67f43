"""What test_launch.py starts as the ranks of a run: `rank.py FOLDER what`. Each rank leaves its pid in FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

from rsft_lib.lifeline import die_with_parent


def main(what: str) -> None:
    rank = os.environ["RANK"]
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    if what == "finish":
        print(f"rank {rank} was here with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
        return
    if what.startswith("fail") and rank == "1":
        raise KeyError(f"broken on rank {rank}")
    time.sleep(600)


if __name__ == "__main__":
    die_with_parent()
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "fail-recorded":
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main(what)
