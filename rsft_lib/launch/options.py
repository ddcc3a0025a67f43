"""Launch options of notebook 05: where a training runs, and what happens to it when the notebook ends."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

from rsft_lib.training.config import TrainConfig, explained

LAUNCHERS = ("local", "slurm")
LAYOUTS = ("given", "auto")
ON_INTERRUPT = ("stop", "leave")


@explained
@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Where a training runs, and what happens to it when its notebook ends."""

    launcher: str = "local"
    """'local': torchrun on this machine; 'slurm': a batch job."""
    layout: str = "given"
    """'auto': for the number of ranks the advisor chooses parallel sizes, `recompute`, `recompute_layers`, `moments`,
    `gradients` and `micro_batch_size`, unless they are set to other than their defaults; without a GPU it assumes
    H100s. Or 'given'."""
    on_interrupt: str = "stop"
    """If the notebook is interrupted or its kernel ends for any reason: 'stop' (save and end) or 'leave' (continue)."""
    slurm_nodes: int = 1
    """Machines, each with `nproc` ranks."""
    slurm_partition: str = ""
    """Partition; empty for the cluster's default."""
    slurm_time: str = ""
    """Time limit in Slurm's format, e.g. '04:00:00'; empty for the partition's default."""
    slurm_ahead: int = 300
    """Seconds before the time limit at which the run saves and is requeued."""
    slurm_options: str = ""
    """More options for sbatch, as on its command line."""

    def __post_init__(self):
        for name, choices in (("launcher", LAUNCHERS), ("layout", LAYOUTS), ("on_interrupt", ON_INTERRUPT)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose {', '.join(map(repr, choices))}")
        for name in ("slurm_partition", "slurm_time", "slurm_options"):
            if not getattr(self, name).isprintable():
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one line")
        if self.slurm_nodes < 1 or self.slurm_ahead < 1:
            raise ValueError(
                f"slurm_nodes is {self.slurm_nodes}, slurm_ahead is {self.slurm_ahead}; both must be at least 1"
            )
        if self.slurm_nodes > 1 and self.launcher != "slurm":
            raise ValueError(
                f"slurm_nodes is {self.slurm_nodes}, but launcher is {self.launcher!r}, which uses one machine"
            )

    def ranks(self, nproc: int) -> int:
        """The total number of ranks, with `nproc` on each machine."""
        return nproc * self.slurm_nodes


HERE = LaunchOptions()


def split_parameters(parameters: SimpleNamespace) -> tuple[TrainConfig, LaunchOptions]:
    """Split the parameters of a notebook into the settings of the training and its launch options."""
    given = vars(parameters)
    return TrainConfig(**_fields(TrainConfig, given)), LaunchOptions(**_fields(LaunchOptions, given))


def _fields(kind: type[TrainConfig | LaunchOptions], given: dict) -> dict:
    return {field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given}
