"""What a result was measured on and with."""

import importlib.metadata
import platform
from typing import Any

import jax

import pspinal_jax


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what its numbers depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version(), "pspinal_jax": pspinal_jax.__version__}
    return found | {name: importlib.metadata.version(name) for name in names}


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
    import os

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        name = models[0] if models else name
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
