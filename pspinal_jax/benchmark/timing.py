"""Timing alternatives fairly: warm, blocked, interleaved (A B C A B C ..), and in the same arithmetic.

An accelerator multiplies float32 in several ways, and JAX and PyTorch choose differently by default. A comparison is of
the same arithmetic only if both are told:

- float32: full float32 products;
- tf32: float32 arrays whose products round their operands to TF32 (10 bits of fraction), on GPUs that have it;
- bfloat16: layers compute in bfloat16; what stays float32 may use TF32.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

Work = Callable[[int], Any]
"""Does so many repetitions of the work, and returns when they are done."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per repetition of one alternative.

    Attributes:
      seconds: one value per round.
      first_call: seconds of the first call of all, compilation included.
    """

    seconds: np.ndarray
    first_call: float

    def summary(self) -> dict[str, Any]:
        """median, its 95 % confidence interval, quartiles, number of rounds and first_call, in seconds."""
        low, high = median_interval(self.seconds)
        return {
            "median": float(np.median(self.seconds)),
            "interval_95": [low, high],
            "quartiles": np.quantile(self.seconds, [0.25, 0.75]).tolist(),
            "rounds": len(self.seconds),
            "first_call": self.first_call,
        }


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the median, by bootstrap with a fixed seed."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def ratio(peer: Timing, ours: Timing) -> dict[str, Any]:
    """How many times faster `ours` is than `peer`: median over rounds of the ratio, and its 95 % interval.

    Both were timed in every round, so a slow spell of the machine hits both sides of a ratio.
    """
    ratios = peer.seconds / ours.seconds
    low, high = median_interval(ratios)
    return {"median": float(np.median(ratios)), "interval_95": [low, high]}


def time_interleaved(
    work: Mapping[str, Work],
    *,
    rounds: int = 15,
    seconds_per_round: float = 0.3,
    most_repetitions: int = 1_000_000,
    warm: bool = True,
) -> dict[str, Timing]:
    """Time every alternative once per round, in turn, each after a pause and a tenth of its work untimed.

    Args:
      work: the alternatives by name. Each must block until its work is done.
      rounds: how often each is timed.
      seconds_per_round: repetitions per timing are chosen so that it takes about so long.
      most_repetitions: upper bound on them.
      warm: False times single repetitions, right after the first call: for work of many seconds.

    Returns:
      A `Timing` for each.
    """
    # On CPU a peer's threads spin for a while after its work, and are let to sleep.
    pause = 0.2 if jax.default_backend() == "cpu" else 0.01
    first_call, repetitions = {}, {}
    for name, do in work.items():
        start = time.perf_counter()
        do(1)
        first_call[name] = time.perf_counter() - start
        repetitions[name] = _calibrate(do, seconds_per_round, most_repetitions) if warm else 1
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            time.sleep(pause)
            if warm:
                do(max(1, repetitions[name] // 10))
            start = time.perf_counter()
            do(repetitions[name])
            seconds[name].append((time.perf_counter() - start) / repetitions[name])
    return {name: Timing(np.asarray(values), first_call[name]) for name, values in seconds.items()}


def _calibrate(do: Work, seconds: float, most: int) -> int:
    count = 1
    while True:
        start = time.perf_counter()
        do(count)
        elapsed = time.perf_counter() - start
        if elapsed > seconds / 4 or count >= most:
            return max(1, min(most, round(count * seconds / max(elapsed, 1e-9))))
        count = min(most, count * 4)


Precision = Literal["float32", "tf32", "bfloat16"]
_IN_JAX = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "tensorfloat32"}


def usual_precisions() -> Sequence[Precision]:
    """Those that this machine tells apart: a CPU has no TF32."""
    return ("float32", "bfloat16") if jax.default_backend() == "cpu" else ("float32", "tf32", "bfloat16")


def set_precision(precision: Precision) -> None:
    """Set the products of this process, JAX's and (where it is installed) PyTorch's."""
    jax.config.update("jax_default_matmul_precision", _IN_JAX[precision])
    try:
        import torch
    except ImportError:
        return
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.benchmark = True  # as XLA, which tries a convolution's algorithms too


def layer_dtype(precision: Precision) -> Literal["float32", "bfloat16"]:
    """The dtype that layers compute in."""
    return "bfloat16" if precision == "bfloat16" else "float32"
