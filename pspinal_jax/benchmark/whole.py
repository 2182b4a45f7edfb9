"""Benchmarks of whole commands: `train` from start to end, decoded images a second, and trials of `compare`."""

import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pspinal_jax.benchmark.timing import Case, Entry, Settings, has_torch, table
from pspinal_jax.comparison.settings import CompareConfig, HeadName, draw_trial, training_seed
from pspinal_jax.comparison.train import Examples, Part, Schedule, Task, Trainer, build_head
from pspinal_jax.data.images import Files, ImageSplit
from pspinal_jax.data.stream import stream
from pspinal_jax.errors import RunError, UsageError, printable


def train(
    settings: Settings,
    train: Sequence[str] = ("digits",),
    published_data: Path | None = None,
    published_epochs: int = 50,
) -> list[Case]:
    """`train` from the shell.

    Args:
      settings: how much is measured.
      train: a recipe and flags, which lack their leading dashes.
      published_data: an .npz file on which PyTorch trains the published settings too.
      published_epochs: for so many epochs; the script has 50.
    """
    words = [train[0], *(f"--{flag}" for flag in train[1:])]

    def case() -> Entry:
        """The cache is empty for 'cold', and for 'warm' the one that it filled; the two take turns."""
        seconds: dict[str, list[float]] = {"cold": [], "warm": []}
        for _ in range(settings.rounds):
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"PSPINAL_JAX_CACHE": f"{folder}/cache"}
                environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a cache of the user's would never be cold
                for name, values in seconds.items():
                    start = time.perf_counter()
                    _run(["pspinal_jax", "train", *words, "--workdir", f"{folder}/{name}"], environment)
                    values.append(time.perf_counter() - start)
        rows = [
            {"compilation cache": name, "median s": float(np.median(each)), "each": ", ".join(f"{s:.1f}" for s in each)}
            for name, each in seconds.items()
        ]
        title = printable(f"seconds of `pspinal-jax train {' '.join(words)}`, process start to end")
        return table(title, rows, {"s": {f"{name} cache": each for name, each in seconds.items()}}, seconds=seconds)

    def published() -> Entry:
        lines = train_published(Path(str(published_data)), published_epochs)
        last = lines[-1]
        row = {"epochs": last["epoch"], "test accuracy %": last["test"], "s": last["seconds"]}
        bars = {"s": {f"{last['epoch']} epochs: {last['test']:.2f} %": [last["seconds"]]}}
        return table("the published settings in PyTorch", [row], bars, epochs=lines)

    return [Case("train", case), *([Case("published settings in PyTorch", published)] if published_data else [])]


def train_published(data: Path, epochs: int) -> list[dict[str, float]]:
    """The published settings of the MNIST row in PyTorch: a line an epoch, seconds from the start.

    Raises:
      RunError: if it fails, as without torch.
    """
    words = ["pspinal_jax.benchmark.torch_reference", str(data), str(epochs), str(time.time())]
    return [json.loads(line) for line in _run(words, os.environ).splitlines()]


def _run(words: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise RunError(f"{' '.join(words)} failed: {reason}")
    return done.stdout


NUM_FILES = 256
SIZE = (230, 230)
BATCH_SIZE = 16
"""What the image recipes train with."""
_WARM_UP = 8
"""Batches that do not count: the first of each worker wait for its start."""
Batches = Generator[tuple[np.ndarray, np.ndarray]]


def images(settings: Settings, pictures: int = 4800, workers: int = 2) -> list[Case]:
    """Passes over JPEGs.

    Args:
      settings: how much is measured.
      pictures: images in a pass.
      workers: worker processes.

    Raises:
      UsageError: if there are too few images to time.
    """
    least = BATCH_SIZE * (_WARM_UP + 1)
    if pictures < least or workers < 1 or settings.rounds < 1:
        raise UsageError(f"give at least --pictures {least}, --workers 1 and --rounds 1")

    def case() -> Entry:
        with tempfile.TemporaryDirectory() as folder:
            split = write_images(Path(folder), NUM_FILES)
            order = np.random.default_rng(0).integers(0, len(split), pictures)
            passes = image_passes(split, order, workers)
            check_same_batches(passes)
            measured = measure_passes(passes, settings.rounds)
        rates = {name: np.asarray(values["images_per_second"]) for name, values in measured.items()}
        first = next(iter(rates.values()))
        rows = [
            {
                "alternative": name,
                "images/s, median": round(float(np.median(rate))),
                "each": ", ".join(f"{value:.0f}" for value in rate),
                "s to the first batch": float(np.median(measured[name]["seconds_to_first_batch"])),
                "s to end": float(np.median(measured[name]["seconds_to_end"])),
                # Within a round, so that a slow spell of the machine hits both sides.
                "the first is faster by": "" if rate is first else f"{np.median(first / rate):.2f} x",
            }
            for name, rate in rates.items()
        ]
        title = f"{pictures} JPEGs of about 500x375, decoded and resized to {SIZE[0]}x{SIZE[1]}, batch {BATCH_SIZE}"
        bars = {"images/s": {name: rate.tolist() for name, rate in rates.items()}}
        return table(title, rows, bars, alternatives=measured)

    return [Case("passes", case)]


@cache
def _photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    found: list[np.ndarray] = load_sample_images().images
    return found


def cut_image(seed: int) -> bytes:
    """A JPEG of about 500x375, some 50 kB: a part of one of scikit-learn's two photographs, decided by `seed`."""
    rng, photograph = np.random.default_rng(seed), _photographs()[seed % 2]
    height, width = 375 + int(rng.integers(-30, 31)), 500 + int(rng.integers(-40, 41))
    top, left = int(rng.integers(photograph.shape[0] - height)), int(rng.integers(photograph.shape[1] - width))
    buffer = io.BytesIO()
    Image.fromarray(photograph[top : top + height, left : left + width]).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def write_images(folder: Path, count: int) -> ImageSplit:
    """`count` images as files in `folder`."""
    names = [f"{number:04d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(cut_image(number))
    return ImageSplit(Files(folder, names), np.arange(count, dtype=np.int32))


class TorchExamples:
    """A data set for torch's DataLoader: images opened, converted and resized by Pillow, as torchvision does it."""

    def __init__(self, images: ImageSplit, order: np.ndarray) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        number = int(self.order[index])
        with Image.open(self.images.encoded.name(number)) as image:
            resized = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
        return np.array(resized), int(self.images.labels[number])


def image_passes(images: ImageSplit, order: np.ndarray, workers: int) -> dict[str, Callable[[], Batches]]:
    """By name, what starts a pass over `order`; ours comes first, PyTorch's last where it is installed."""

    def torch_batches() -> Batches:
        import torch

        # This process runs JAX's threads, and must not be forked.
        how: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
        loader: Any = torch.utils.data.DataLoader(TorchExamples(images, order), BATCH_SIZE, **how)
        for pixels, labels in loader:
            yield pixels.numpy(), labels.numpy()

    batches = np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))
    passes: dict[str, Callable[[], Batches]] = {
        f"stream, {workers} workers": lambda: stream(images, batches, SIZE, workers=workers),
        "stream, threads": lambda: stream(images, batches, SIZE),
    }
    return passes | ({f"torch DataLoader, {workers} workers": torch_batches} if has_torch() else {})


def check_same_batches(passes: dict[str, Callable[[], Batches]]) -> None:
    """Return if the first batches of all are the same.

    Raises:
      RunError: if one differs.
    """
    first = {}
    for name, start in passes.items():
        with contextlib.closing(start()) as batches:
            first[name] = next(batches)
    reference = next(iter(first))
    for name, batch in first.items():
        if not all(map(np.array_equal, batch, first[reference])):
            raise RunError(f"{name} and {reference} give different batches")


def measure_passes(passes: dict[str, Callable[[], Batches]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Per alternative and round, in turn: seconds to the first batch, images a second, and seconds to end.

    The rate is that from the warm-up to the last batch; what follows, until the workers have gone, is 'seconds_to_end'.
    """
    kinds = ("images_per_second", "seconds_to_first_batch", "seconds_to_end")
    results: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in passes}
    for _ in range(rounds):
        for name, start in passes.items():
            begin = time.perf_counter()
            batches = start()
            next(batches)
            results[name]["seconds_to_first_batch"].append(time.perf_counter() - begin)
            for _ in itertools.islice(batches, _WARM_UP - 1):
                pass
            begin, count = time.perf_counter(), 0
            for _, labels in batches:
                count, last = count + len(labels), time.perf_counter()
            results[name]["images_per_second"].append(count / (last - begin))
            results[name]["seconds_to_end"].append(time.perf_counter() - last)
    return results


NUM_FEATURES, NUM_CLASSES, NUM_TRAIN, NUM_VALIDATION = 1280, 101, 2424, 606
"""Caltech-101 on frozen features, as `compare` splits it."""


def compare(
    settings: Settings,
    trials: int = 4,
    epochs: int = 20,
    batch_size: int = 64,
    heads: Sequence[HeadName] = ("progressive", "spinal", "mlp", "dense"),
) -> list[Case]:
    """Trials of each head, beside the same trainings in eager PyTorch.

    Args:
      settings: not used: nothing is repeated.
      trials: of every head.
      epochs: passes of each trial.
      batch_size: examples a step.
      heads: their names.

    Raises:
      UsageError: without torch.
    """
    if not has_torch():
        raise UsageError("benchmark compare has nothing to compare with: torch is not installed (extra `torch`)")
    schedule = Schedule(epochs, NUM_TRAIN // batch_size, batch_size, 500)

    def case(name: HeadName) -> Entry:
        first, ours, theirs = trial_seconds(name, trials, schedule)
        row = {"head": name, "compare, s": ours, "first trial, compilation included, s": first}
        row |= {"PyTorch eager, s": theirs, "times as long": theirs / ours}
        bars = {"s": {f"{name}, compare": [ours], f"{name}, PyTorch eager": [theirs]}}
        return table(f"{trials} trials of {epochs} epochs a head, batch {batch_size}", [row], bars)

    return [Case(name, partial(case, name)) for name in heads]


def trial_seconds(name: HeadName, trials: int, schedule: Schedule) -> tuple[float, float, float]:
    """Seconds of the first trial, which compiles, of so many trials, and of the same ones in PyTorch."""
    from pspinal_jax.benchmark.torch_reference import TorchHead, train_head

    rng = np.random.default_rng(0)
    count = NUM_TRAIN + NUM_VALIDATION
    inputs = rng.normal(size=(count, NUM_FEATURES)).astype(np.float32)
    examples = Examples(inputs, rng.integers(0, NUM_CLASSES, count).astype(np.int32))
    rows, validation = np.split(np.arange(count, dtype=np.int32), [NUM_TRAIN])
    padded = np.pad(validation, (0, -NUM_VALIDATION % schedule.eval_batch_size))
    shift, scale = np.zeros(NUM_FEATURES, np.float32), np.ones(NUM_FEATURES, np.float32)
    part = Part(rows, padded, shift, scale)
    drawn = [draw_trial(CompareConfig(), number, ("all",)) for number in range(trials)]
    tasks = [Task(i, name, trial, training_seed(0, "trial", i), part) for i, trial in enumerate(drawn)]
    head: Any = build_head(name, NUM_FEATURES, NUM_CLASSES, 256, 4, "published")[0]
    trainer, seconds = Trainer({name: head}, schedule, trials), list[float]()
    for some in (tasks[:1], tasks):
        start = time.perf_counter()
        list(trainer.run(some, examples))
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    for task in tasks:
        width, hparams = getattr(head, "layer_width", 0), task.trial.hparams
        model = TorchHead(name, NUM_FEATURES, NUM_CLASSES, width, dropout_rate=hparams.dropout_rate)
        train_head(model, schedule, hparams, task.seed, inputs[:NUM_TRAIN], examples.labels[:NUM_TRAIN])
    return seconds[0], seconds[1], time.perf_counter() - start
