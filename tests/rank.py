"""What tests start as the ranks of a run, in place of those that train: `rank.py FOLDER what`, or as those are started,
`rank.py --config FOLDER/config.json`. Each rank leaves its pid in FOLDER.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from rsft_lib.common.parent_death import die_with_parent
from rsft_lib.launch.job import ENVIRONMENT


def main(what: str) -> None:
    rank = os.environ["RANK"]
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what == "train":
        signal.signal(signal.SIGTERM, save)
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    if what == "finish":
        told = [os.environ[name] for name in ("OMP_NUM_THREADS", *ENVIRONMENT)]
        print(f"rank {rank} was here with threads and settings {' '.join(told)}", flush=True)
        return
    if what.startswith("fail") and rank == "1":
        raise KeyError(f"broken on rank {rank}")
    time.sleep(600)


def save(number: int, _frame) -> None:
    """Take a while, then end as a training does that was asked to; asked again meanwhile, end at once.

    Stricter than a training (signals.py), so that tests see who asks twice.
    """
    signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    time.sleep(1)
    if os.environ["RANK"] == "0":
        (folder / "ended.json").write_text(json.dumps({"reason": signal.Signals(number).name, "iteration": 3}))
    sys.exit()


if __name__ == "__main__":
    die_with_parent()
    if sys.argv[1] == "--config":
        folder, what = Path(sys.argv[2]).parent, os.environ.get("RANKS_SHALL", "train")
    else:
        folder, what = Path(sys.argv[1]), sys.argv[2]
    if what == "fail-recorded":
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)
    main(what)
