"""`export RUN_DIR`, a run as a program by itself; `doctor`, what is installed; and `gradients`, a study."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import tyro

from pspinal_jax import __version__
from pspinal_jax.commands.parse import NoArguments, parse
from pspinal_jax.errors import PSpinalError, printable
from pspinal_jax.files import CACHE_SWITCH, cache_folder, shipped

_DEVELOPERS = ("test", "docs", "notebooks", "examples")
"""Extras that doctor leaves out."""
_PLUGINS = {"cuda": "jax-cuda13-plugin", "tpu": "libtpu"}
"""The packages that extras of jax bring."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a run's classifier, images or features to probabilities, as a file for CPU, CUDA and TPU."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Run directory of a finished `train`; or an older export, which is written again by the JAX of today."""
    output: Path | None = None
    """The directory to write; by default RUN_DIR/export, of an export its own. An export that is there is replaced,
    nothing else is."""
    format: Literal["jax", "onnx"] = "jax"
    """onnx: also model.onnx, for ONNX Runtime on servers, in browsers and on phones (extra `onnx`)."""
    seed_index: int | None = None
    """Which of the run's seeds, from 0; by default the best on validation."""


def export(args: Sequence[str]) -> int:
    """Run the command with its arguments; returns the exit status."""
    parsed = parse(ExportArguments, args, "export", "runs/digits")
    from pspinal_jax.runs.export import export_run

    output = export_run(parsed.run_dir, parsed.output, parsed.seed_index, parsed.format)
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
    parse(NoArguments, args, "doctor", "", description="Print versions, devices, caches, free space and extras.")
    for name, text in _findings():
        print(printable(f"{name:<20}  {text}"), flush=True)
    return 0


def _findings() -> Iterator[tuple[str, str]]:
    yield "pspinal_jax", f"{__version__} in {Path(__file__).parents[1]}"
    yield "python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}"
    for package, extra in requirements():
        target = f"'.[{extra}]' in the checkout" if extra else package
        version = _version(package) or f"missing: pip install {target}"
        yield (f"extra {extra}", f"{package} {version}") if extra else (package, version)
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
    yield "current folder", _describe_folder(Path.cwd())
    yield from ending_exports(Path(), datetime.date.today() + datetime.timedelta(days=30))


def ending_exports(folder: Path, before: datetime.date) -> Iterator[tuple[str, str]]:
    """The exports in `folder`, and where `export` puts them below it, that JAX is sure to read only until `before`."""
    for path in sorted({*folder.glob("*/export.json"), *folder.glob("runs/*/export/export.json")}):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged file, or of an earlier version
            until = datetime.date.fromisoformat(json.loads(path.read_bytes())["guaranteed_until"])
            if until < before:
                advice = f"pspinal-jax export {path.parent} writes it again"
                yield "export", f"{path.parent}: newer versions of JAX are sure to read it until {until} only; {advice}"


def requirements() -> Iterator[tuple[str, str]]:
    """The packages that this one names, each with its extra or "", and without extras for developers."""
    named = importlib.metadata.requires("pspinal-jax") if _version("pspinal-jax") else None
    for requirement in named or ():  # nothing in a checkout that is not installed
        package = re.split(r"[^\w.-]", requirement)[0]
        extra = "".join(re.findall(r"extra == ['\"]([\w-]+)", requirement))
        if extra not in _DEVELOPERS:
            yield _PLUGINS.get(extra, package), extra


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_folder(folder: Path) -> str:
    """Path, size and free space of a folder that need not exist."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = f"{shutil.disk_usage(place).free / 1e9:,.1f} GB free"
    return f"{folder}, {free}{'' if place == folder else ', not there yet'}"
