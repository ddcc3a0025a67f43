"""Launch ranks outside this process: on this machine under torchrun, or on a cluster with Slurm."""

from rsft_lib.launch.failure import RunFailed, RunStopped
from rsft_lib.launch.job import Job
from rsft_lib.launch.local import launch
from rsft_lib.launch.offline import launch_sampling, launch_scoring, launch_verification
from rsft_lib.launch.options import LaunchOptions, split_parameters
from rsft_lib.launch.training import attach, launch_training, start_training

__all__ = [
    "Job", "LaunchOptions", "RunFailed", "RunStopped", "attach", "launch", "launch_sampling", "launch_scoring",
    "launch_training", "launch_verification", "split_parameters", "start_training",
]  # fmt: skip
