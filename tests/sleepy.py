"""What test_stopping.py starts in place of rsft_lib.training.train: rank 1 falls asleep in its third micro-batch."""

import os
import time

from rsft_lib.training import batches, train

seen = 0
beat = batches.beat


def fall_asleep() -> None:
    global seen
    seen += 1
    beat()
    if os.environ["RANK"] == "1" and seen == 3:
        time.sleep(600)


if __name__ == "__main__":
    batches.beat = fall_asleep
    train.main()
