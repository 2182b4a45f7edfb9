"""The benchmarks by name: what `benchmark NAME` measures, and in which order and how long `benchmark all` does."""

from importlib import import_module
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """One measurement.

    Attributes:
      title: its heading.
      cases: ``module.function`` of this package that makes its cases, called with `Settings` and options.
      share: of the time of `benchmark all`, which passes on what a section leaves; 0 if it is not a section of that.
      against_peak: whether its products are compared with the machine's best.
    """

    title: str
    cases: str
    share: float = 0.0
    against_peak: bool = False

    def make_cases(self, settings: Any, **options: Any) -> list[Any]:
        """Its cases; see timing.py for `Case` and `Settings`."""
        module, function = self.cases.split(".")
        made: list[Any] = getattr(import_module(f"pspinal_jax.benchmark.{module}"), function)(settings, **options)
        return made


BENCHMARKS = {
    "machine": Benchmark("The machine's peak rates", "timing.machine", 0.5),
    "step": Benchmark("A training step of the MNIST row: 784 pixels, the head, batch 64", "steps.step", 1.3, True),
    "head": Benchmark("The head alone, forward and backward, dropout on", "head.head", 2.2, True),
    "vgg5": Benchmark("VGG-5: the KMNIST row", "steps.vgg5", 1.5, True),
    "seeds": Benchmark("Seeds side by side", "steps.seeds", 1.2),
    "efficientnet_lite0": Benchmark("EfficientNet-Lite0 and head", "steps.efficientnet_lite0", 1.0, True),
    "resnet50": Benchmark("ResNet-50 and head", "steps.resnet50", 0.8, True),
    "wide_resnet101_2": Benchmark("Wide-ResNet-101-2 and head", "steps.wide_resnet101_2", 1.2, True),
    "depth": Benchmark("Depth: compile time and run time", "head.depth", 0.6),
    "epoch": Benchmark("A whole epoch of the MNIST row", "steps.epoch", 0.7, True),
    "augmentation": Benchmark("Augmentation", "steps.augmentation", 0.2),
    "compile": Benchmark("`train` from start to end, with an empty and a warm compilation cache", "whole.train"),
    "input": Benchmark("Images decoded and resized a second, beside a PyTorch DataLoader", "whole.images"),
    "compare": Benchmark("Trials of `compare`, beside the same trainings in eager PyTorch", "whole.compare"),
}
SECTIONS = {name: benchmark.share for name, benchmark in BENCHMARKS.items() if benchmark.share}
"""The sections of `benchmark all`, in its order, with their shares of the time."""
