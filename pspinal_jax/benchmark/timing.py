"""Timing alternatives fairly: warm, blocked, interleaved (A B C A B C ..), and in the same arithmetic.

An accelerator multiplies float32 in several ways, and JAX and PyTorch choose differently by default. A comparison is of
the same arithmetic only if both are set to it:

- float32: full float32 products;
- tf32: float32 arrays whose products round their operands to TF32 (10 bits of fraction), on GPUs that have it;
- bfloat16: layers compute in bfloat16; what stays float32 may use TF32.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pspinal_jax.training.costs import save_peak

Work = Callable[[int], Any]
"""Does so many repetitions of the work, and returns when they are done."""
Entry = dict[str, Any]
"""A table of the outcome: title, columns, rows, bars to plot, and the numbers behind them."""
EAGER, COMPILED = "PyTorch eager", "torch.compile"
REDUCED, GRAPH = "torch.compile, reduce-overhead", "PyTorch, the step as a CUDA graph"
Precision = Literal["float32", "tf32", "bfloat16"]


class Case(NamedTuple):
    """A part of a benchmark.

    Attributes:
      name: what is measured, in a few words.
      run: measures it; returns None if it only checks that alternatives do the same work.
      precision: the arithmetic, which is set before.
      further: whether `benchmark all` measures it after the comparisons with PyTorch of all sections, see `beyond`.
      times: about how many times as long it takes as the section's comparison.
    """

    name: str
    run: Callable[[], Entry | None]
    precision: Precision = "float32"
    further: bool = False
    times: float = 1.0


def beyond(case: Case, times: float = 1.0) -> Case:
    """`case` as one of those for which time may be left when every section has its comparison."""
    return case._replace(further=True, times=times)


_MIN_ROUNDS = 2
_IN_JAX = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "tensorfloat32"}


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
      peaks: operations a second of products by precision, where they have been measured.
      deadline: time of `time.monotonic` from which on no round begins but the first two.
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
    peaks: dict[str, float] = dataclasses.field(default_factory=dict)
    deadline: float = math.inf

    def time(self, work: "Mapping[str, Work]", rounds: int | None = None, warm: bool = True) -> "dict[str, Timing]":
        """`work` by name, timed in turn."""
        how: dict[str, Any] = {"rounds": rounds or self.rounds, "seconds_per_round": self.seconds_per_round}
        return time_interleaved(work, warm=warm, deadline=self.deadline, **how)


def torch_modes(quick: bool) -> tuple[str, ...]:
    """The forms of PyTorch to compare with; `quick` ones leave out its compiler, which takes minutes for a network."""
    cuda = has_torch() and torch_device() == "cuda"
    forms = (EAGER, *([GRAPH] if cuda else []), *([] if quick else [COMPILED, *([REDUCED] if cuda else [])]))
    return forms if has_torch() else ()


def machine_settings(precisions: Sequence[Precision] = (), tiny: bool = False, **changes: Any) -> Settings:
    """The settings for this machine; `tiny` ones walk every case in seconds and measure nothing worth knowing."""
    cpu = jax.default_backend() == "cpu"
    settings = Settings(precisions or (("float32", "bfloat16") if cpu else ("float32", "tf32", "bfloat16")))
    if tiny:
        sizes: dict[str, Any] = {"seeds": (1, 2), "depths": (2, 4), "image_batch": 2, "image_side": 32}
        changes = {"rounds": 1, "seconds_per_round": 0.01, "vgg5_steps": 1} | sizes | changes
    elif not cpu:
        sizes = {"seeds": (1, 4, 16, 64, 256, 512), "image_batch": 64, "vgg5_steps": 937}
        changes = {"rounds": 9, "seconds_per_round": 0.1} | sizes | changes
    return dataclasses.replace(settings, **changes)


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return find_spec("torch") is not None


def torch_device() -> str:
    """The device of PyTorch's side: a GPU where JAX runs on one."""
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Compute this process's products, JAX's and (where it is installed) PyTorch's, in `precision`; then as before."""
    name = "jax_default_matmul_precision"
    with contextlib.ExitStack() as after:
        after.callback(jax.config.update, name, jax.config.values[name])
        jax.config.update(name, _IN_JAX[precision])  # not JAX's context manager, which leaves other threads alone
        if has_torch():
            import torch

            after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")
            # As XLA, cuDNN tries a convolution's algorithms.
            for flag, value in (("allow_tf32", precision != "float32"), ("benchmark", True)):
                after.callback(setattr, torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
                setattr(torch.backends.cudnn, flag, value)
        yield


def layer_dtype(precision: Precision) -> Literal["float32", "bfloat16"]:
    """The dtype that layers compute in."""
    return "bfloat16" if precision == "bfloat16" else "float32"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per repetition of one alternative.

    Attributes:
      seconds: one value per round.
      first_call: seconds of the first call of all, compilation included.
    """

    seconds: np.ndarray
    first_call: float

    @property
    def median(self) -> float:
        """Of the rounds."""
        return float(np.median(self.seconds))


def calls(function: Callable[..., Any], *args: Any) -> Work:
    """Calls of ``function(*args)`` from Python, waited for at the end."""

    def work(count: int) -> None:
        result = None
        for _ in range(count):
            result = function(*args)
        jax.block_until_ready(result)

    return work


def looped(body: Callable[[Any, Any], Any], start: Any) -> Work:
    """``value = body(index, value)`` from `start` on, as one compiled loop; returns the last value."""
    run = jax.jit(lambda count, value: lax.fori_loop(0, count, body, value))
    return lambda count: jax.block_until_ready(run(np.int32(count), start))


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % confidence interval of the median, by bootstrap with a fixed seed (scipy's takes no single round)."""
    medians = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def ratio(other: Timing, reference: Timing) -> dict[str, Any]:
    """How many times faster `reference` is than `other`: median over rounds of the ratio, and its 95 % interval.

    Both were timed in every round, so a slow spell of the machine hits both sides of a ratio.
    """
    ratios = other.seconds / reference.seconds
    return {"median": float(np.median(ratios)), "interval_95": median_interval(ratios)}


def time_interleaved(
    work: Mapping[str, Work],
    *,
    rounds: int = 15,
    seconds_per_round: float = 0.3,
    max_repetitions: int = 1_000_000,
    warm: bool = True,
    deadline: float = math.inf,
) -> dict[str, Timing]:
    """Time every alternative once per round, in turn, each after a pause and a tenth of its work untimed.

    Args:
      work: the alternatives by name. Each must block until its work is done.
      rounds: how often each is timed.
      seconds_per_round: repetitions per timing are chosen so that it takes about so long.
      max_repetitions: upper bound on them.
      warm: False times single repetitions, right after the first call: for work of many seconds.
      deadline: time of `time.monotonic` from which on no round begins but the first two.

    Returns:
      A `Timing` for each.
    """
    # On CPU another library's threads spin for a while after its work, and are given time to sleep.
    pause = 0.2 if jax.default_backend() == "cpu" else 0.01
    first_call, repetitions = {}, {}
    for name, do in work.items():
        start = time.perf_counter()
        do(1)
        first_call[name] = time.perf_counter() - start
        repetitions[name] = _calibrate(do, seconds_per_round, max_repetitions) if warm else 1
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        if number >= _MIN_ROUNDS and time.monotonic() > deadline:
            break
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
    timings = settings.time(work, rounds, warm)
    first, peak = next(iter(timings.values())), settings.peaks.get(precision)
    rows, alternatives, bars = [], dict[str, Any](), dict[str, list[float]]()
    for name, timing in timings.items():
        median, (low, high) = timing.median, median_interval(timing.seconds)
        times = None if timing is first else ratio(timing, first)
        share = None if peak is None else flops / median / peak
        alternatives[name] = {
            "median": median,
            "interval_95": (low, high),
            "rounds": len(timing.seconds),
            "first_call": timing.first_call,
            "examples_per_second": examples / median,
            "share_of_peak": share,
            "times_faster": times,
        }
        bars[name] = [1e3 * low, 1e3 * median, 1e3 * high]
        row = {"alternative": name, "median ms": 1e3 * median, "95 % interval": f"{1e3 * low:.3f} .. {1e3 * high:.3f}"}
        row |= {"of peak": None if share is None else f"{100 * share:.0f} %", "first call s": timing.first_call}
        row["examples/s"] = round(examples / median)
        row["faster by"] = "{:.2f} x ({:.2f} .. {:.2f})".format(times["median"], *times["interval_95"]) if times else ""
        rows.append(row)
    peers = [name for name in timings if "orch" in name]
    numbers: dict[str, Any] = {"precision": precision, "flops": flops, "alternatives": alternatives}
    numbers["fastest_of_torch"] = min(peers, key=lambda name: timings[name].median) if peers else None
    return table(title, rows, {"ms (median, 95 % interval)": bars}, **numbers)


def table(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    bars: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    **numbers: Any,
) -> Entry:
    """A table; tables of one title are shown as one.

    Args:
      title: its heading.
      rows: the cells by their columns.
      bars: what is plotted: by unit and label, one or several values.
      **numbers: what else results.json holds of it.
    """
    cells = [list(row.values()) for row in rows]
    return {"title": title, "columns": list(rows[0]), "rows": cells, "bars": bars or {}, **numbers}


def machine(settings: Settings) -> list[Case]:
    """The rates of a large matrix product in JAX and in PyTorch, and of copies (read and written)."""
    size, length = (2048, 1 << 25) if jax.default_backend() == "cpu" else (8192, 1 << 28)

    def case(precision: Precision) -> Entry:
        dtype = layer_dtype(precision)
        numbers = np.random.default_rng(0).standard_normal((size, size), np.float32) / size
        matrix, vector = jnp.asarray(numbers, dtype), jnp.zeros(length, jnp.float32)
        # XLA's CPU compiler is slow at products that give bfloat16, and fast at those that are rounded to it.
        summed = jnp.float32 if jax.default_backend() == "cpu" else dtype

        def product(_: Any, pair: Any) -> Any:
            return jnp.matmul(*pair, preferred_element_type=summed).astype(dtype), pair[1]

        work: dict[str, Work] = {
            "products": looped(product, (matrix, matrix)),
            "copies": looped(lambda _, value: value + 1, vector),
        }
        if has_torch():
            work["PyTorch"] = _torch_products(numbers, dtype)
        seconds = {name: timing.median for name, timing in time_interleaved(work, rounds=5).items()}
        rates = {name: 2 * size**3 / value for name, value in seconds.items()}
        settings.peaks[precision], copied = rates["products"], 2 * vector.nbytes / seconds["copies"]
        save_peak(precision, rates["products"])
        row: dict[str, Any] = {"precision": precision, "JAX, TFLOP/s": rates["products"] / 1e12}
        row["PyTorch, TFLOP/s"] = rates["PyTorch"] / 1e12 if "PyTorch" in rates else None
        row["copies, GB/s"] = round(copied / 1e9)
        found: dict[str, Any] = {"flops_per_second": rates["products"], "bytes_per_second": copied}
        return table("Peak rates", [row], precision=precision, **found)

    cases = [Case(precision, partial(case, precision), precision) for precision in settings.precisions]
    return cases[:1] + [beyond(each) for each in cases[1:]]


def _torch_products(numbers: np.ndarray, dtype: str) -> Work:
    import torch

    matrix = torch.from_numpy(numbers).to(torch_device(), getattr(torch, dtype))

    def products(count: int) -> None:
        value = matrix
        for _ in range(count):
            value = value @ matrix
        float(value[0, 0])  # waits for the device

    return products
