"""One rank of a training run: `torchrun ... -m rsft_lib.training.train --config run.json`."""

import argparse
import os
import warnings
from datetime import timedelta
from pathlib import Path

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|full scope).*")

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from rsft_lib.host import cuda_on_cpu  # noqa: E402
from rsft_lib.launch import die_with_parent  # noqa: E402
from rsft_lib.training.config import TrainConfig  # noqa: E402
from rsft_lib.training.loop import train  # noqa: E402


@record
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="JSON file with the fields of TrainConfig")
    config = TrainConfig.from_json(parser.parse_args().config)
    die_with_parent()
    config.data_parallel(int(os.environ["WORLD_SIZE"]))
    with cuda_on_cpu():
        start_ranks(config)
        train(config)
        torch.distributed.destroy_process_group()


def start_ranks(config: TrainConfig) -> None:
    """Join the other ranks and divide them into tensor, pipeline and data-parallel groups."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(minutes=10))
    parallel_state.initialize_model_parallel(config.tensor_parallel, config.pipeline_parallel)
    torch.manual_seed(config.seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(config.seed)


if __name__ == "__main__":
    main()
