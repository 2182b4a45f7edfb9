"""What training costs: operations, the share of the device's peak, memory, waiting; and traces and programs to look at.

Operations are those of products and convolutions, counted in the traced program, so that custom calls of a library and
elementwise work change nothing. The peak is what `benchmark machine` measured on the same kind of device; where it was
not run, no share is given.
"""

import contextlib
import json
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pspinal_jax.distributed import is_primary
from pspinal_jax.environment import device
from pspinal_jax.errors import RunError
from pspinal_jax.files import cache_folder, check_target, expanded, write_json, write_text
from pspinal_jax.progress import say

MEASURED = (
    *("seconds", "examples_per_second", "compile_seconds", "input_seconds"),
    *("flops_per_second", "share_of_peak", "peak_memory_mb"),
)
"""The fields of an epoch's line that are measured: they differ from run to run."""
PROFILED_STEPS = 8
_PEAKS = "peaks.json"
_MOST = 1e30
_NOT_KNOWN = "not known (run `pspinal-jax benchmark machine`)"


def count_flops(function: Callable[..., Any], *args: Any) -> Counter[str]:
    """Floating-point operations of the products and convolutions in ``function(*args)``, by their operands' dtype.

    What a loop of a known length repeats counts so often, another loop's body once; of several branches the longest
    counts. Zeros that pad a convolution's input count, those between the entries of a spread one do not.

    Args:
      function: a function of arrays; of a jitted one that was called with such arguments nothing is traced again.
      args: arrays, or shapes as `jax.ShapeDtypeStruct`.
    """
    traced = function if hasattr(function, "trace") else jax.jit(function)
    return _count(traced.trace(*args).jaxpr)


def _count(jaxpr: Any) -> Counter[str]:
    total: Counter[str] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            left, right, out = equation.invars[0].aval, equation.invars[1].aval, equation.outvars[0].aval
            if name == "dot_general":
                each = math.prod(left.shape[axis] for axis in params["dimension_numbers"][0][0])
            else:
                channels = right.shape[params["dimension_numbers"].rhs_spec[0]]
                each = right.size / channels / math.prod(params["lhs_dilation"])
            total[str(left.dtype)] += round(2 * out.size * each)
        inner = [_count(each) for each in jax.tree.leaves(list(params.values())) if _is_jaxpr(each)]
        if name == "cond":
            inner = [max(inner, key=lambda counts: counts.total())]
        times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
        for counts in inner:
            total.update({dtype: times * flops for dtype, flops in counts.items()})
    return total


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def save_peak(precision: str, flops_per_second: float) -> None:
    """Keep the measured rate of products on this kind of device, for `measured_peak`."""
    if (folder := cache_folder()) is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            peaks, kind = _read_peaks(folder), device()["kind"]
            before = measured_peak(precision) or 0.0  # a busy hour does not lower the peak
            peaks.setdefault(kind, {})[precision] = max(before, flops_per_second)
            write_json(folder / _PEAKS, peaks)


def measured_peak(dtype: str) -> float | None:
    """The rate of products of `dtype` that `benchmark machine` found on this kind of device; None if it was not run.

    A GPU multiplies float32 as TF32, and a TPU as bfloat16, unless JAX's default precision says otherwise.
    """
    platform, chosen = jax.default_backend(), jax.config.values["jax_default_matmul_precision"]
    if dtype == "float32" and platform != "cpu" and chosen not in ("highest", "float32"):
        dtype = "tf32" if platform == "gpu" else "bfloat16"
    folder = cache_folder()
    peak = None if folder is None else _read_peaks(folder).get(device()["kind"], {}).get(dtype)
    return float(peak) if isinstance(peak, int | float) and peak > 0 else None


def _read_peaks(folder: Path) -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {kind: dict(rates) for kind, rates in json.loads((folder / _PEAKS).read_text()).items()}
    return {}


class StepCosts:
    """Operations of one step, and the device's peak for them.

    Attributes:
      flops: of a step, by dtype, over all seeds and devices.
      devices: how many share the work.
    """

    def __init__(self, flops: Mapping[str, float], devices: int = 1) -> None:
        self.flops = sum(flops.values())
        peak = measured_peak(max(flops, key=lambda dtype: flops[dtype])) if flops else None
        together = 1 if jax.default_backend() == "cpu" else devices  # the cores of a CPU are one peak
        self._peak = None if peak is None else peak * together

    def fields(self, steps_per_second: float) -> dict[str, float]:
        """The fields of an epoch's line: what is not known is left out."""
        rate = self.flops * steps_per_second
        found: dict[str, float] = {"flops_per_second": float(f"{rate:.4g}")} if rate else {}
        if rate and self._peak is not None:
            found["share_of_peak"] = round(rate / self._peak, 4)
        peaks = [(each.memory_stats() or {}).get("peak_bytes_in_use", 0) for each in jax.local_devices()]
        return found | ({"peak_memory_mb": round(max(peaks) / 1e6)} if max(peaks) else {})


def total_costs(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What all these epochs cost: rates over the seconds of training, sums of other seconds, the largest memory.

    A rate that an epoch lacks is left out; so are values that are not numbers.
    """

    def values(name: str) -> list[float]:
        found = [line.get(name) for line in lines]
        return [float(each) if isinstance(each, int | float) and 0 <= each < _MOST else 0.0 for each in found]

    seconds = values("seconds")
    total = {name: round(sum(values(name)), 3) for name in ("seconds", "compile_seconds", "input_seconds")}
    for name in ("examples_per_second", "flops_per_second", "share_of_peak"):
        if any(seconds) and all(values(name)):
            total[name] = float(f"{sum(map(operator.mul, values(name), seconds)) / sum(seconds):.4g}")
    memory = max(values("peak_memory_mb"), default=0.0)
    return total | ({"peak_memory_mb": memory} if memory else {})


def describe_costs(costs: Mapping[str, float]) -> dict[str, str]:
    """`total_costs` in words, by what they are of; {} where nothing was trained."""
    if "examples_per_second" not in costs:
        return {}
    rate, share, memory = (costs.get(name) for name in ("flops_per_second", "share_of_peak", "peak_memory_mb"))
    scale, unit = (1e12, "T") if (rate or 0) >= 1e12 else (1e9, "G") if (rate or 0) >= 1e9 else (1e6, "M")
    return {
        "training": f"{costs['seconds']:.1f} s, {costs['examples_per_second']:,.0f} examples/s",
        "compiling": f"{costs['compile_seconds']:.1f} s",
        "waiting for input": f"{costs['input_seconds']:.1f} s",
        "products and convolutions": "not counted" if rate is None else f"{rate / scale:.3g} {unit}FLOP/s",
        "share of the device's measured peak": _NOT_KNOWN if share is None else f"{100 * share:.1f} %",
        "peak device memory": "not reported" if memory is None else f"{memory:,.0f} MB",
    }


class Inspection:
    """What to write down of a training, for people: a trace of a few steps, and the compiled programs.

    Attributes:
      profile: folder of the trace, which XProf and Perfetto open; None for none.
      dump_hlo: folder of the programs' text; None for none.
    """

    def __init__(self, profile: Path | str | None = None, dump_hlo: Path | str | None = None) -> None:
        """Raises as `check_target` where a folder cannot be written."""
        self.profile, self.dump_hlo = (None if path is None else expanded(path) for path in (profile, dump_hlo))
        self._warm = False
        for name, folder in (("profile", self.profile), ("dump_hlo", self.dump_hlo)):
            if folder is not None:
                check_target(folder, name, "file")

    @property
    def due(self) -> bool:
        """Whether the next steps are to be traced: the first ones have warmed up."""
        return self._warm and self.profile is not None

    @contextlib.contextmanager
    def steps(self, first: int) -> Iterator[None]:
        """Within the `with`, steps are taken, from number `first` on; they are traced if that is due.

        Raises:
          RunError: if the trace cannot be written.
        """
        folder, self._warm = self.profile if self.due else None, True
        if folder is None:
            yield
            return
        self.profile = None  # on every process, so that all take the same steps
        if not is_primary():
            yield
            return
        try:
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
        except RuntimeError as error:  # another trace is being written
            raise RunError(f"profile is {folder}, but no trace can begin: {error}") from error
        try:
            with jax.profiler.StepTraceAnnotation("train_steps", step_num=first):
                yield
        finally:
            jax.profiler.stop_trace()
        say(f"a trace of steps is in {folder}: open it with XProf, or its .json.gz files with ui.perfetto.dev")

    def dump(self, calls: Mapping[str, tuple[Any, Any]], prefix: str) -> None:
        """Write the text of the programs in `calls`, name -> (jitted function, shapes of its arguments).

        Raises:
          RunError: if it cannot be written.
        """
        for name, (program, args) in calls.items() if self.dump_hlo is not None else ():
            text = program.lower(*args).compile().as_text() or ""  # on every process: XLA may compile together
            if is_primary():
                path = Path(str(self.dump_hlo)) / f"{prefix}-{name}.hlo.txt"
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, text)
                except OSError as error:
                    raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
