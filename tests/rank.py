"""Ranks that do not train, for tests: `rank.py FOLDER what`, or with the arguments of a training,
`rank.py --config FOLDER/config.json`. Each rank writes its pid into FOLDER.
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
        values = [os.environ[name] for name in ("OMP_NUM_THREADS", *ENVIRONMENT)]
        print(f"rank {rank} was here with threads and settings {' '.join(values)}", flush=True)
        return
    if what.startswith("fail") and rank == "1":
        raise KeyError(f"broken on rank {rank}")
    time.sleep(600)


def save(number: int, _frame) -> None:
    """Take a second, then end like a training that was asked to stop; a second signal ends the rank immediately.

    This is stricter than a training (signals.py), so that tests notice repeated signals.
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
