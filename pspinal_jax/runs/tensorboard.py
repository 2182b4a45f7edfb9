"""TensorBoard events of a run, written with tensorboardX (no TensorFlow)."""

from pathlib import Path
from typing import Any

import numpy as np

from pspinal_jax.errors import UsageError


def check_installed() -> None:
    """Raise UsageError, naming the extra, where tensorboardX is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise UsageError("--tensorboard needs tensorboardX; in the checkout: pip install '.[tensorboard]'") from None


def write_events(lines: list[dict[str, Any]], directory: Path) -> None:
    """Write every line of metrics.jsonl as scalars by step, one curve per stage; several seeds as their mean."""
    from tensorboardX import SummaryWriter

    for stage in dict.fromkeys(line["stage"] for line in lines):
        with SummaryWriter(str(directory / stage)) as writer:
            for line in (line for line in lines if line["stage"] == stage):
                for key, value in line.items():
                    if key not in ("stage", "step"):
                        writer.add_scalar(key, float(np.mean(value)), line["step"])
