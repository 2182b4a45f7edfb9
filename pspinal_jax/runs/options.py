"""How a run is carried out, as opposed to what it computes."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of `train` that are no part of the recipe."""

    workdir: Path | None = None
    """Run directory, runs/RECIPE by default; an unfinished run in it is resumed."""
    init_from: Path | None = None
    """Start from the selected parameters of this run directory."""
    checkpoint_seconds: float = 1.0
    """Least time between two checkpoints; the first epoch and the end are always saved."""
    workers: int = 0
    """Processes that decode photographs; 0 for threads of this one, which on few cores is as fast."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
