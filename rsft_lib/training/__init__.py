"""Training on megatron-core: `torchrun -m rsft_lib.training.train --config run.json`."""
