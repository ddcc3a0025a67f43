"""One rank that runs several trainings in a row, for test_gpu.py: `many.py CONFIG ...`"""

import sys
from pathlib import Path

from rsft_lib.training.config import TrainConfig
from rsft_lib.training.train import run

if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        run(TrainConfig.from_file(path))
