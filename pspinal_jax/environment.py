"""Versions and devices that a result was measured with, and JAX's persistent compilation cache.

The cache is on by default: a program is compiled once per machine, not once per start.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import pspinal_jax
from pspinal_jax.errors import UsageError
from pspinal_jax.files import CACHE_SWITCH, cache_folder

CONVOLUTIONS_SWITCH = "PSPINAL_JAX_ONEDNN"
"""Environment variable: 'off' leaves convolutions on CPU to XLA's own routines."""

_ONEDNN: dict[str, bool | str] = {
    "xla_cpu_experimental_onednn_custom_call": True,
    # XLA's YNNPACK fusion would take every convolution before oneDNN's rewriter sees it.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}


LOOPS_SWITCH = "PSPINAL_JAX_LOOP_GRAPHS"
"""Environment variable: 'on' compiles loops into CUDA graphs, as far as `loop_options` finds that this works."""

_LOOP_GRAPHS: dict[str, bool | str] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}
_PROOF = """
import jax
import jax.numpy as jnp

def loop(matrix):
    step = lambda number, value: jnp.sin(value @ value) + number
    return jax.lax.fori_loop(0, 3, lambda _, value: jax.lax.fori_loop(0, 32, step, value), matrix)

matrix, graph = jnp.eye(64), jax.jit(loop, compiler_options={options})
expected = jax.jit(loop)(matrix)
for _ in range(3):  # before XLA of December 2025 the second execution crashed
    assert jnp.allclose(graph(matrix), expected, atol=1e-3)
"""
_PROOF_SECONDS = 120


# JAX's settings with which the same run gives other numbers.
_DECIDING = (
    "default_prng_impl",
    "threefry_partitionable",
    "random_seed_offset",
    "enable_x64",
    "default_matmul_precision",
)
_library_convolves = ContextVar("library_convolves", default=False)


def convolution_options(platform: str) -> dict[str, bool | str]:
    """Options of XLA for programs with convolutions, see `jit_with`: oneDNN's on CPU, where jaxlib has them.

    A tiny program shows whether they are known and take effect (jaxlib 0.11.2 and 0.12; not 0.10). Products of matrices
    lose by them, so that a program of these alone is better compiled without.

    Args:
      platform: of the devices that the program is for.

    Returns:
      {} on other platforms, where they have no effect, and with PSPINAL_JAX_ONEDNN=off.
    """
    off = platform != "cpu" or os.environ.get(CONVOLUTIONS_SWITCH) == "off"
    return {} if off or not _has_onednn() else dict(_ONEDNN)


@cache
def _has_onednn() -> bool:
    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    images, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 16), (3, 3, 16, 16)))
    try:
        with jax.default_device(jax.devices("cpu")[0]), _kept_out_of_the_cache():
            compiled = jax.jit(convolve).lower(images, kernel).compile(compiler_options=dict(_ONEDNN))
        return "__onednn$convolution" in (compiled.as_text() or "")
    except Exception:  # an unknown option raises when compiling, of a kind that is nobody's promise
        return False


def loop_options(platform: str) -> dict[str, bool | str]:
    """Options of XLA with which a CUDA device takes the steps of a loop without the host; off by default.

    Args:
      platform: of the devices that the program is for.

    Returns:
      {} unless PSPINAL_JAX_LOOP_GRAPHS=on, on CUDA (ROCm crashes), where a process that runs a tiny loop so ended well.
    """
    if platform != "gpu" or os.environ.get(LOOPS_SWITCH) != "on":
        return {}
    cuda = "cuda" in str(jax.devices("gpu")[0].client.platform_version).lower()
    return dict(_LOOP_GRAPHS) if cuda and _loops_run_as_graphs() else {}


@cache
def _loops_run_as_graphs() -> bool:
    code = _PROOF.replace("{options}", repr(_LOOP_GRAPHS))
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # this process holds most of the memory
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, check=False, timeout=_PROOF_SECONDS)
        return done.returncode == 0
    return False


def jit_with(compiler_options: Mapping[str, bool | str], function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit(function, **options)` with options of XLA for this program, which leave the user's XLA_FLAGS alone.

    One with oneDNN's convolutions is not kept in the compilation cache: jaxlib 0.12 cannot store it.
    """
    if compiler_options:
        options["compiler_options"] = dict(compiler_options)
    if not compiler_options.keys() - _LOOP_GRAPHS.keys():
        return jax.jit(function, **options)

    @wraps(function)
    def traced(*args: Any) -> Any:
        with convolving_by_library():
            return function(*args)

    return _Uncached(jax.jit(traced, **options))


@contextlib.contextmanager
def convolving_by_library() -> Iterator[None]:
    """What is traced meanwhile runs where convolutions are a library's, as with `jit_with`'s options."""
    token = _library_convolves.set(True)
    try:
        yield
    finally:
        _library_convolves.reset(token)


def library_convolves() -> bool:
    """Whether what is being traced will run with a library's convolutions on CPU: a layer may choose its form."""
    return _library_convolves.get()


class _Uncached:
    """A jitted function that is compiled, whenever that is, without being stored."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def __call__(self, *args: Any) -> Any:
        with _kept_out_of_the_cache():
            return self._program(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)


@contextlib.contextmanager
def _kept_out_of_the_cache() -> Iterator[None]:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what its numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version(), "pspinal_jax": pspinal_jax.__version__}
    return found | {name: importlib.metadata.version(name) for name in names}


def jax_settings() -> dict[str, Any]:
    """JAX's settings that decide numbers, by their names without "jax_"."""
    return {name: getattr(jax.config, f"jax_{name}", None) for name in _DECIDING}


def set_jax(settings: Mapping[str, Any]) -> None:
    """Give this process the settings that `jax_settings` found in another one."""
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)


def check_platform() -> None:
    """Raise UsageError if JAX is configured for a platform that this machine does not have."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(" (set JAX_PLATFORMS")[0] or "it has no such devices"
        raise UsageError(
            f"JAX cannot compute on the platform {jax.config.values['jax_platforms']!r}: {' '.join(reason.split())}; "
            "set JAX_PLATFORMS=cpu, or unset it and let JAX choose"
        ) from error


def device() -> dict[str, Any]:
    """The devices that JAX computes on."""
    devices = jax.devices()
    kind = devices[0].device_kind
    processes = {"processes": jax.process_count()} if jax.process_count() > 1 else {}
    return processes | {
        "platform": devices[0].platform,
        "kind": processor() if kind == "cpu" else kind,
        "count": len(devices),
    }


def processor() -> str:
    """The processor's model name, as far as the system tells it, with the number of its cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {os.cpu_count()} cores"


def enable_compilation_cache() -> Path | None:
    """Turn the cache on, in the user's cache folder by default.

    The folder is $PSPINAL_JAX_CACHE, or else $XDG_CACHE_HOME/pspinal_jax/xla, or else ~/.cache/pspinal_jax/xla.
    PSPINAL_JAX_CACHE=off turns it off. A cache that JAX is already configured with (JAX_COMPILATION_CACHE_DIR) is kept.

    Returns:
      The folder, or None where there is no cache: one whose name is not UTF-8 is left out.

    Raises:
      UsageError: as `check_platform`.
    """
    check_platform()
    base = cache_folder()
    if base is None:
        return None
    configured = jax.config.values["jax_compilation_cache_dir"]
    folder = Path(configured) if configured else base if os.environ.get(CACHE_SWITCH) else base / "xla"
    try:
        str(folder).encode()
        if configured:
            return folder
        folder.mkdir(parents=True, exist_ok=True)
    except (
        UnicodeEncodeError,
        OSError,
    ):  # XLA takes UTF-8 alone; a home that cannot be written must not end a training
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    _drop_cut_off_entry(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's own thresholds skip programs that compile in under a second, and most of ours do.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _drop_cut_off_entry(folder: Path) -> None:
    """Delete the newest entry if a kill cut it off while it was written.

    JAX would warn of it at every start and never write it anew. Only zlib's format is looked into, which JAX uses on
    Python below 3.14 without the package zstandard.
    """
    with contextlib.suppress(OSError):  # other processes write to and delete from the folder too
        newest = max(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns, default=None)
        if newest is None:
            return
        content = newest.read_bytes()
        try:
            if not content or content.startswith(b"\x78"):
                zlib.decompress(content)
        except zlib.error:
            newest.unlink()
