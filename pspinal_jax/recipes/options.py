"""How a run is carried out, as opposed to what it computes, and how its processes find each other."""

import dataclasses
from pathlib import Path

from pspinal_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of `train` that are no part of the recipe."""

    workdir: Path | None = None
    """Run directory, runs/RECIPE by default; an unfinished run in it is resumed."""
    init_from: Path | None = None
    """Start from the selected parameters and running statistics of this run directory; where its classes are others,
    the output layer starts anew."""
    checkpoint_seconds: float = 1.0
    """Least time between two checkpoints; the first epoch and the end are always saved."""
    workers: int = 0
    """Processes that decode image files; 0 for threads of this one, which on few cores is as fast."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """How a run's processes find each other.

    Address, number and id are given together, or JAX finds them in the cluster's environment.
    """

    distributed: bool = False
    """Run as one of several processes, on one or more machines; every process is started with the same command."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, reachable from all. Without it JAX asks SLURM, Open MPI, Kubernetes or Cloud TPU."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """This process's number, from 0."""
    initialization_timeout: int = 120
    """Seconds to wait at the start until all processes are there."""
    heartbeat_timeout: int = 30
    """Seconds without a sign of life after which a process counts as dead, and the others end."""

    def __post_init__(self) -> None:
        for name in ("initialization_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected 1 or more seconds")
