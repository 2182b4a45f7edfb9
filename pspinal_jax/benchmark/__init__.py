"""The registry of benchmarks, by name and in the order of `benchmark all`; and `step`, which times any module."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
      title: heading.
      cases: ``module.function`` of this package that makes its cases, called with `Settings` and options.
      seconds: approximate time of its comparison with PyTorch on 2 CPU cores, including start-up; 0 if it is not a
        section of `benchmark all`.
      against_peak: whether its operations are compared with the machine's peak rate.
    """

    title: str
    cases: str
    seconds: float = 0.0
    against_peak: bool = False

    def make_cases(self, settings: Any, **options: Any) -> list[Any]:
        """Make the cases; see timing.py for `Case` and `Settings`."""
        module, function = self.cases.split(".")
        made: list[Any] = getattr(import_module(f"pspinal_jax.benchmark.{module}"), function)(settings, **options)
        return made


BENCHMARKS = {
    "machine": Benchmark("The machine's peak rates", "timing.machine", 12),
    "step": Benchmark("A training step of the MNIST row: 784 pixels, the head, batch 64", "steps.step", 20, True),
    "head": Benchmark("The head alone, forward and backward, dropout on", "head.head", 20, True),
    "vgg5": Benchmark("VGG-5: the KMNIST row", "steps.vgg5", 40, True),
    "seeds": Benchmark("Seeds side by side", "steps.seeds", 15),
    "efficientnet_lite0": Benchmark("EfficientNet-Lite0 and head", "steps.efficientnet_lite0", 50, True),
    "resnet50": Benchmark("ResNet-50 and head", "steps.resnet50", 70, True),
    "wide_resnet101_2": Benchmark("Wide-ResNet-101-2 and head", "steps.wide_resnet101_2", 130, True),
    "depth": Benchmark("Depth: compile time and run time", "head.depth", 15),
    "epoch": Benchmark("A whole epoch of the MNIST row", "steps.epoch", 25, True),
    "augmentation": Benchmark("Augmentation", "steps.augmentation", 12),
    "compile": Benchmark("`train` from start to end, with an empty and a warm compilation cache", "whole.train"),
    "input": Benchmark("Images decoded and resized a second, beside a PyTorch DataLoader", "whole.images"),
    "compare": Benchmark("Trials of `compare`, beside the same trainings in eager PyTorch", "whole.compare"),
}
SECTIONS = {name: benchmark.seconds for name, benchmark in BENCHMARKS.items() if benchmark.seconds}
"""The sections of `benchmark all` in order -> approximate seconds of their comparison with PyTorch."""


def step(
    model: Any,
    batch: Any,
    *,
    peers: Mapping[str, Callable[[], Any]] | None = None,
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    rounds: int = 7,
    seconds_per_round: float = 0.2,
    **training: Any,
) -> dict[str, Any]:
    """Time a training step of any model that `fit` accepts, inside the compiled loop and called from Python.

    Example::

        >>> import flax.linen as nn, numpy as np
        >>> from pspinal_jax import benchmark
        >>> x, y = np.zeros((64, 32), np.float32), np.zeros(64, np.int32)
        >>> entry = benchmark.step(nn.Dense(10), (x, y), rounds=2, seconds_per_round=0.01)
        >>> list(entry["alternatives"])
        ['compiled loop', 'jitted step, Python loop']

    Args:
      model: model, as for `fit`.
      batch: (x, y), arrays [B, ...] with the B examples of one step, or trees of them.
      peers: name -> function that does the same step in another way; it is timed in turn, until its result is ready.
      precision: precision of matrix products in JAX and PyTorch during the call: float32, tf32 or bfloat16.
      rounds: number of timings of each alternative.
      seconds_per_round: approximate duration of each timing.
      **training: optimizer, loss, metrics, augment and mesh, as for `fit`, and the fields of `FitOptions`.

    Returns:
      A dict with title, columns and rows of a table; `flops`, the operations of a step's products and convolutions; and
      `alternatives`: name -> seconds (`median`, `interval_95`), `examples_per_second`, and `times_faster`, the speed of
      the first alternative as a multiple of this one's.

    Raises:
      PSpinalError: like `fit`.
    """
    from pspinal_jax.benchmark.steps import time_step
    from pspinal_jax.benchmark.timing import machine_settings, products_in
    from pspinal_jax.training.costs import measured_peak

    peaks = {} if (peak := measured_peak(precision)) is None else {precision: peak}
    settings = machine_settings((precision,), peaks=peaks, rounds=rounds, seconds_per_round=seconds_per_round)
    with products_in(precision):
        return time_step(model, batch, peers=peers, settings=settings, precision=precision, **training)
