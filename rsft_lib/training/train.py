"""One rank of a training run: `torchrun ... -m rsft_lib.training.train --config run.json`."""

if __name__ == "__main__":
    from rsft_lib.common.parent_death import die_with_parent

    die_with_parent()  # before the imports below, which take seconds

import argparse
import importlib
import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from rsft_lib.model.distributed import ranks
from rsft_lib.training.config import TrainConfig
from rsft_lib.training.loop import train
from rsft_lib.training.watchdog import START


def run(config: TrainConfig) -> None:
    """Train as the rank given by torchrun's environment variables."""
    config.data_parallel(int(os.environ["WORLD_SIZE"]))
    if config.eval_generate_every:
        importlib.import_module("transformers.generation.utils")  # with torch's compiler, an error within `cpu_shim`
    with ranks(
        config.tensor_parallel, config.pipeline_parallel, config.seed,
        context_parallel_size=config.context_parallel, virtual_pipeline_size=config.virtual_pipeline,
        expert_parallel_size=config.expert_parallel, expert_tensor_parallel_size=config.expert_tensor_parallel,
        timeout=max(START, config.save_timeout),
    ):  # fmt: skip
        train(config)


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON or YAML file with the fields of TrainConfig")
    run(TrainConfig.from_file(parser.parse_args().config))


if __name__ == "__main__":
    main()
