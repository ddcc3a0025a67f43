"""One rank of a training run: `torchrun ... -m rsft_lib.training.train --config run.json`."""

import argparse
import os
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope).*")

from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from rsft_lib.launch import die_with_parent  # noqa: E402
from rsft_lib.ranks import ranks  # noqa: E402
from rsft_lib.training.config import TrainConfig  # noqa: E402
from rsft_lib.training.loop import train  # noqa: E402


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the fields of TrainConfig")
    config = TrainConfig.from_json(parser.parse_args().config)
    die_with_parent()
    config.data_parallel(int(os.environ["WORLD_SIZE"]))
    with ranks(config.tensor_parallel, config.pipeline_parallel, config.seed):
        train(config)


if __name__ == "__main__":
    main()
