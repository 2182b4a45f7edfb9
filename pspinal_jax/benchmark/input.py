"""`benchmark input`: decoded, resized images a second, beside a PyTorch DataLoader that does the same."""

import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pspinal_jax.benchmark.measurement import Case, Entry, Settings, has_torch, table
from pspinal_jax.data.images import Files, ImageSplit
from pspinal_jax.data.stream import stream
from pspinal_jax.errors import RunError, UsageError

NUM_FILES = 256
SIZE = (230, 230)
BATCH_SIZE = 16
"""What the image recipes train with."""
_WARM_UP = 8
"""Batches that do not count: the first of each worker wait for its start."""

Batches = Iterator[tuple[np.ndarray, np.ndarray]]


def cases(settings: Settings, pictures: int = 4800, workers: int = 2) -> list[Case]:
    """Passes over drawn JPEGs.

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

    def case() -> list[Entry]:
        with tempfile.TemporaryDirectory() as folder:
            images = write_images(Path(folder))
            order = np.random.default_rng(0).integers(0, len(images), pictures)
            passes = alternatives(images, order, workers)
            if has_torch():
                passes |= torch_alternatives(images, order, workers)
            check_equal(passes)
            return [_summary(measure(passes, settings.rounds), pictures)]

    return [("passes", case)]


def draw_image(seed: int) -> bytes:
    """A JPEG of about 500x375, some 50 kB: soft colours, noise, and shapes with edges, all decided by `seed`."""
    rng = np.random.default_rng(seed)
    width, height = 500 + int(rng.integers(-40, 41)), 375 + int(rng.integers(-30, 31))
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
    noisy = soft + rng.normal(0, 8, (height, width, 1))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, side = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(10, 120))
        draw.ellipse((x, y, x + side, y + side // 2), fill=tuple(rng.integers(0, 256, 3).tolist()))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_images(folder: Path, count: int = NUM_FILES) -> ImageSplit:
    """`count` drawn images as files in `folder`."""
    names = [f"{number:04d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(draw_image(number))
    return ImageSplit(Files(folder, names), np.arange(count, dtype=np.int32))


class TorchExamples:
    """What a torch DataLoader takes: images opened, converted and resized by Pillow, as torchvision does it."""

    def __init__(self, images: ImageSplit, order: np.ndarray) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        number = int(self.order[index])
        with Image.open(self.images.encoded.name(number)) as image:
            resized = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.BILINEAR)
        return np.array(resized), int(self.images.labels[number])


def alternatives(images: ImageSplit, order: np.ndarray, workers: int) -> dict[str, Callable[[], Batches]]:
    """By name, what starts a pass over `order`; ours comes first."""
    return {
        f"stream, {workers} workers": lambda: stream(images, order, SIZE, BATCH_SIZE, workers=workers),
        "stream, threads": lambda: stream(images, order, SIZE, BATCH_SIZE),
    }


def torch_alternatives(images: ImageSplit, order: np.ndarray, workers: int) -> dict[str, Callable[[], Batches]]:
    """PyTorch's DataLoader with as many workers.

    Raises:
      ImportError: if torch is not installed.
    """
    import torch

    def load() -> Batches:
        loader = torch.utils.data.DataLoader(
            TorchExamples(images, order),
            BATCH_SIZE,
            num_workers=workers,
            # As ours are: this process runs JAX's threads, and must not be forked.
            multiprocessing_context="spawn" if workers else None,
        )
        for pixels, labels in loader:
            yield pixels.numpy(), labels.numpy()

    return {f"torch DataLoader, {workers} workers": load}


def check_equal(passes: dict[str, Callable[[], Batches]]) -> None:
    """Return if the first batches of all are the same.

    Raises:
      RunError: if one differs.
    """
    first = {}
    for name, start in passes.items():
        batches = start()
        first[name] = next(batches)
        batches.close()  # type: ignore[attr-defined]
    (reference, (images, labels)), *others = first.items()
    for name, (other_images, other_labels) in others:
        if not (np.array_equal(images, other_images) and np.array_equal(labels, other_labels)):
            raise RunError(f"{name} and {reference} give different batches")


def measure(passes: dict[str, Callable[[], Batches]], rounds: int) -> dict[str, dict[str, list[float]]]:
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


def _summary(measured: dict[str, dict[str, list[float]]], pictures: int) -> Entry:
    rates = {name: np.asarray(values["images_per_second"]) for name, values in measured.items()}
    median = {name: float(np.median(values)) for name, values in rates.items()}
    ours, *others = rates
    # Within a round, so that a slow spell of the machine hits both sides.
    times = {name: float(np.median(rates[ours] / rates[name])) for name in others}
    rows = [
        [
            name,
            round(median[name]),
            ", ".join(f"{rate:.0f}" for rate in rates[name]),
            float(np.median(values["seconds_to_first_batch"])),
            float(np.median(values["seconds_to_end"])),
            f"{times[name]:.2f} x" if name in times else "(ours)",
        ]
        for name, values in measured.items()
    ]
    columns = ["alternative", "images/s, median", "each", "s to the first batch", "s to end", "ours is faster by"]
    title = f"{pictures} JPEGs of about 500x375, decoded and resized to {SIZE[0]}x{SIZE[1]}, batch {BATCH_SIZE}"
    bars = {"images/s": {name: values["images_per_second"] for name, values in measured.items()}}
    fields = {"title": title, "alternatives": measured, "median": median, "times_faster": times}
    return table(title, columns, rows, bars, fields)
