"""The flags by which a run becomes one of several processes."""

import dataclasses


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
