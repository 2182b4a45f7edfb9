"""What a result was measured on and with, and JAX's persistent compilation cache.

The cache is on by default: a program is compiled once per machine, not once per start.
"""

import contextlib
import importlib.metadata
import os
import platform
import zlib
from pathlib import Path
from typing import Any

import jax

import pspinal_jax
from pspinal_jax.errors import UsageError
from pspinal_jax.files import CACHE_SWITCH, cache_folder


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what its numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version(), "pspinal_jax": pspinal_jax.__version__}
    return found | {name: importlib.metadata.version(name) for name in names}


def check_platform() -> None:
    """Raise UsageError where JAX is told to compute on a platform that this machine does not have."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        told = str(error).split(" (set JAX_PLATFORMS")[0] or "it has no such devices"
        raise UsageError(
            f"JAX cannot compute on the platform {jax.config.values['jax_platforms']!r}: {' '.join(told.split())}; set "
            "JAX_PLATFORMS=cpu, or unset it and let JAX choose"
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
    """The processor's model name, as far as the system tells, with the number of its cores given to us."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def enable_compilation_cache() -> Path | None:
    """Turn the cache on, in the user's cache folder, unless the user said otherwise.

    The folder is $PSPINAL_JAX_CACHE, or else $XDG_CACHE_HOME/pspinal_jax/xla, or else ~/.cache/pspinal_jax/xla.
    PSPINAL_JAX_CACHE=off turns it off. A cache that JAX is already configured with (JAX_COMPILATION_CACHE_DIR) is kept.

    Returns:
      The folder, or None where there is no cache.

    Raises:
      UsageError: as `check_platform`.
    """
    check_platform()
    base = cache_folder()
    if base is None:
        return None
    configured = jax.config.values["jax_compilation_cache_dir"]
    if configured:
        return Path(configured)
    folder = base if os.environ.get(CACHE_SWITCH) else base / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written is no reason not to train
        return None
    _drop_cut_off_entry(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's own thresholds skip programs that compile in under a second, which here are most of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _drop_cut_off_entry(folder: Path) -> None:
    """Delete the newest entry if a kill cut it off while it was written.

    JAX would warn of it at every start and never write it anew. Only zlib's format is looked into, which JAX uses on
    Python below 3.14 without the package zstandard.
    """
    with contextlib.suppress(OSError):  # other processes write and delete there too
        newest = max(folder.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns, default=None)
        content = b"" if newest is None else newest.read_bytes()
        if newest is None or (content and not content.startswith(b"\x78")):
            return
        try:
            zlib.decompress(content)
        except zlib.error:
            newest.unlink()
