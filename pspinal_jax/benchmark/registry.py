"""The benchmarks by name: what `benchmark NAME` measures, and in which order and how long `benchmark all` does."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """One measurement.

    Attributes:
      title: its heading.
      cases: ``module.function`` of this package that makes its cases, called with `Settings` and options.
      share: of the time of `benchmark all`, which passes on what a part leaves; 0 if it is no part of that.
      against_torch: whether PyTorch does the same work beside it.
      against_peak: whether its products are compared with the machine's best.
      options: always given to `cases`.
    """

    title: str
    cases: str
    share: float
    against_torch: bool = True
    against_peak: bool = False
    options: Mapping[str, Any] = MappingProxyType({})

    def make_cases(self, settings: Any, **options: Any) -> list[Any]:
        """Its cases; see measurement.py for `Case` and `Settings`."""
        module, function = self.cases.split(".")
        made: list[Any] = getattr(import_module(f"pspinal_jax.benchmark.{module}"), function)(
            settings, **self.options, **options
        )
        return made


def _backbone(title: str, share: float, name: str) -> Benchmark:
    return Benchmark(f"{title} and head", "steps.backbone", share, against_peak=True, options={"backbone": name})


BENCHMARKS = {
    "machine": Benchmark("The machine's peak rates", "roofline.cases", 0.5),
    "step": Benchmark(
        "A training step of the MNIST row: 784 pixels, the head, batch 64", "steps.step", 1.3, against_peak=True
    ),
    "head": Benchmark("The head alone, forward and backward, dropout on", "head.cases", 2.2, against_peak=True),
    "vgg5": Benchmark("VGG-5: the KMNIST row", "steps.vgg5", 1.5, against_peak=True),
    "seeds": Benchmark("Seeds side by side", "steps.seeds", 1.2, against_torch=False),
    "efficientnet_lite0": _backbone("EfficientNet-Lite0", 1.0, "efficientnet_lite0"),
    "resnet50": _backbone("ResNet-50", 0.8, "resnet50"),
    "wide_resnet101_2": _backbone("Wide-ResNet-101-2", 1.2, "wide_resnet101_2"),
    "depth": Benchmark("Depth: compile time and run time", "depth.cases", 0.6, against_torch=False),
    "epoch": Benchmark("A whole epoch of the MNIST row", "steps.epoch", 0.7, against_peak=True),
    "augmentation": Benchmark("Augmentation", "augmentation.cases", 0.2, against_torch=False),
    "compile": Benchmark(
        "`train` from process start to end, with an empty and a warm compilation cache",
        "compile.cases",
        0,
        against_torch=False,
    ),
    "input": Benchmark("Images decoded and resized a second, beside a PyTorch DataLoader", "input.cases", 0),
    "compare": Benchmark("Trials of `compare`, beside the same trainings in eager PyTorch", "compare.cases", 0),
}
SECTIONS = {name: benchmark.share for name, benchmark in BENCHMARKS.items() if benchmark.share}
"""The parts of `benchmark all`, in its order, with their shares of the time."""
