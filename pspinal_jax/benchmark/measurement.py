"""What benchmarks are made of: how much is measured, the cases that measure, the entries that hold the outcome."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from pspinal_jax.benchmark.timing import Precision, Work, ratio, set_precision, time_interleaved, usual_precisions

Entry = dict[str, Any]
"""A part of the outcome; `kind` is 'timings', 'table' or 'peak'."""
Case = tuple[str, Callable[[], list[Entry]]]
"""A name, and what measures it."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      precisions: each compared in turn.
      rounds: how often each alternative is timed.
      seconds_per_round: about how long each timing takes.
      quick: leaves out what `benchmark all` has no time for: some alternatives, torch.compile where it takes minutes,
        checks of large networks, and warm-up of work that takes seconds.
      seeds: numbers of seeds trained as one program.
      depths: numbers of layers.
      image_batch: images a step of the image recipes.
      image_side: their side in pixels.
      vgg5_steps: steps of VGG-5 in one timing, a whole epoch on an accelerator.
    """

    precisions: Sequence[Precision]
    rounds: int = 7
    seconds_per_round: float = 0.2
    quick: bool = True
    seeds: Sequence[int] = (1, 2, 4, 8)
    depths: Sequence[int] = (4, 16, 64)
    image_batch: int = 8
    image_side: int = 224
    vgg5_steps: int = 2


def machine_settings(precisions: Sequence[Precision] = (), tiny: bool = False) -> Settings:
    """The settings for this machine; `tiny` ones walk every case in seconds and measure nothing worth knowing."""
    settings = Settings(tuple(precisions or usual_precisions()))
    if tiny:
        small: dict[str, Any] = {"seeds": (1, 2), "depths": (2, 4), "image_batch": 2, "image_side": 32}
        return dataclasses.replace(settings, rounds=1, seconds_per_round=0.01, vgg5_steps=1, **small)
    if jax.default_backend() == "cpu":
        return settings
    large: dict[str, Any] = {"seeds": (1, 4, 16, 64, 256, 512), "image_batch": 64, "vgg5_steps": 937}
    return dataclasses.replace(settings, rounds=9, seconds_per_round=0.1, **large)


def in_precisions(precisions: Sequence[Precision], case: Callable[[Precision], list[Entry]]) -> list[Case]:
    """`case` in each of the precisions, to which both libraries are set before."""

    def under(precision: Precision) -> Callable[[], list[Entry]]:
        def run() -> list[Entry]:
            set_precision(precision)
            return case(precision)

        return run

    return [(precision, under(precision)) for precision in precisions]


def checked(check: Callable[[], None], cases: list[Case]) -> list[Case]:
    """`cases`, the first of which begins with `check`: a check alone would use up the time and measure nothing."""
    (name, first), *others = cases

    def run() -> list[Entry]:
        check()
        return first()

    return [(name, run), *others]


def timed(
    title: str,
    work: Mapping[str, Work],
    flops: int,
    precision: Precision,
    settings: Settings,
    *,
    examples: int,
    rounds: int | None = None,
    warm: bool = True,
) -> Entry:
    """Alternatives timed in turn; the first is ours, which ratios are taken against.

    Args:
      title: what one repetition is.
      work: the alternatives by name.
      flops: floating-point operations of one repetition's products.
      precision: the arithmetic, which has been set.
      settings: how much is measured.
      examples: what one repetition handles.
      rounds: other than the settings'.
      warm: see `time_interleaved`.
    """
    timings = time_interleaved(
        work, rounds=rounds or settings.rounds, seconds_per_round=settings.seconds_per_round, warm=warm
    )
    ours, *others = timings
    alternatives = {name: timing.summary() | {"share_of_peak": None} for name, timing in timings.items()}
    for values in alternatives.values():
        values["examples_per_second"] = examples / values["median"]
    return {
        "kind": "timings",
        "precision": precision,
        "title": title,
        "ours": ours,
        "flops": flops,
        "alternatives": alternatives,
        "times_faster": {name: ratio(timings[name], timings[ours]) for name in others},
    }


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    bars: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Entry:
    """A table; tables of one title are shown as one.

    Args:
      title: its heading.
      columns: their headings.
      rows: the cells.
      bars: what is plotted: by unit and label, one or several values.
      fields: what results.json holds of it at its top level.
    """
    return {
        "kind": "table",
        "title": title,
        "columns": columns,
        "rows": rows,
        "bars": bars or {},
        "fields": fields or {},
    }


def has_torch() -> bool:
    """Whether PyTorch can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def peer_versions() -> dict[str, str]:
    """Versions of what is measured beside this package, where it is installed."""
    found = {}
    for name in ("grain", "pillow", *(("torch",) if has_torch() else ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_memory() -> int | None:
    """Megabytes that XLA held at most on the first device, where it tells."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    return None if peak is None else round(peak / 1e6)


def torch_peak_memory() -> int | None:
    """Megabytes that PyTorch held at most on its GPU, None without one."""
    torch = sys.modules.get("torch")
    return round(torch.cuda.max_memory_allocated() / 1e6) if torch and torch.cuda.is_available() else None
