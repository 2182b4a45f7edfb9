"""`export RUN_DIR` writes a run as a program; `doctor` shows what is installed; `gradients` is a study."""

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
"""The packages that jax's extras install."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a run's classifier, from images or features to probabilities, as one file for CPU, CUDA and TPU."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Directory of a finished run, or of an older export, which is then written again with the installed JAX."""
    output: Path | None = None
    """Directory to write, by default RUN_DIR/export, or the older export's own. An existing export is replaced; any
    other folder is left alone."""
    format: Literal["jax", "onnx"] = "jax"
    """onnx: also write model.onnx, for ONNX Runtime on servers, in browsers and on phones (extra `onnx`)."""
    seed_index: int | None = None
    """Index of the seed, from 0; by default the seed that is best on validation."""


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
    """The gradient study as a module: results/gradients.py, which is part of the wheel."""
    name = "pspinal_jax_gradients"
    spec = importlib.util.spec_from_file_location(name, shipped("results") / "gradients.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where the help finds the text of the flags
    spec.loader.exec_module(module)
    return module


def doctor(args: Sequence[str]) -> int:
    """Print one line per finding; returns the exit status, which is always 0."""
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
    """The exports in `folder` and in its runs/ whose guarantee by JAX ends before the date `before`."""
    for path in sorted({*folder.glob("*/export.json"), *folder.glob("runs/*/export/export.json")}):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged file, or of an earlier version
            until = datetime.date.fromisoformat(json.loads(path.read_bytes())["guaranteed_until"])
            if until < before:
                advice = f"pspinal-jax export {path.parent} writes it again"
                yield "export", f"{path.parent}: JAX guarantees to read it until {until} only; {advice}"


def requirements() -> Iterator[tuple[str, str]]:
    """The required packages, each with its extra or "", except those of extras for developers."""
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
    """Path and free space of a folder, which may not exist yet."""
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = f"{shutil.disk_usage(place).free / 1e9:,.1f} GB free"
    return f"{folder}, {free}{'' if place == folder else ', not there yet'}"
