"""Images per second of the jitted augmentation and of the same two transforms in Pillow, in alternation.

    python results/augmentation_and_pillow.py --data ../shared/data/mnist.npz

Pillow is given its parameters: no time is counted against it for drawing them or for solving for coefficients.
"""

import argparse
import functools
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.pool import Pool
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pspinal_jax.augment import Warp, augment, draw_warp
from pspinal_jax.augment.warp import image_corners, perspective_coefficients, rotate, warp_perspective

_PER_PROCESS = 2048
_STEPS = 64


class Candidate(NamedTuple):
    """Something to time: `call` augments `images` images."""

    name: str
    images: int
    call: Callable[[], object]


def pillow_warp(images: np.ndarray, coefficients: np.ndarray, moved: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """`images` uint8 [N, H, W] through Pillow one by one: perspective where `moved` [N], rotation by `angles` [N]."""
    results = []
    for image, data, warped, angle in zip(images, coefficients.tolist(), moved, angles.tolist(), strict=True):
        pillow = Image.fromarray(image)
        if warped:
            pillow = pillow.transform(
                pillow.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BILINEAR, fillcolor=0
            )
        results.append(np.asarray(pillow.rotate(angle, Image.Resampling.NEAREST, fillcolor=0)))
    return np.stack(results)


def pillow_arguments(images: np.ndarray, warp: Warp) -> tuple[np.ndarray, ...]:
    """What `pillow_warp` takes, for `images` [N, H, W, 1] and `warp`."""
    height, width = images.shape[1:3]
    coefficients = np.asarray(perspective_coefficients(warp.corners, height, width))
    moved = (np.asarray(warp.corners) != image_corners(height, width)).any((1, 2))
    return images[..., 0], coefficients[:, :8] / coefficients[:, 8:], moved, np.asarray(warp.angles)


def two_passes(key: jax.Array, images: jax.Array) -> jax.Array:
    """`augment` as two steps with an image in between, which it replaces."""
    height, width = images.shape[1:3]
    warp = draw_warp(key, images.shape[0], height, width)
    return rotate(warp_perspective(images, perspective_coefficients(warp.corners, height, width)), warp.angles)


def candidates(images: np.ndarray, batch: int, pool: Pool, processes: int) -> list[Candidate]:
    """All that is timed, on `images` uint8 [N, H, W, 1]."""
    data = jnp.asarray(images[:batch])
    functions: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"augment": augment, "two passes": two_passes}
    result = []
    for name, function in functions.items():
        # Each step augments what the last one returned with a key of its own: nothing can be hoisted or left out.
        def step(index: jax.Array, state: jax.Array, function: Callable[..., jax.Array] = function) -> jax.Array:
            return function(jax.random.fold_in(jax.random.key(0), index), state)

        loop = jax.jit(functools.partial(jax.lax.fori_loop, 0, _STEPS, step))
        calls = functools.partial(_one_by_one, functools.partial(jax.jit(function), jax.random.key(1), data))
        result.append(Candidate(f"{name}, jitted calls", batch * _STEPS, calls))
        result.append(Candidate(f"{name}, in a fori_loop", batch * _STEPS, functools.partial(loop, data)))
    part = images[:_PER_PROCESS]
    warp = draw_warp(jax.random.key(2), len(part), *part.shape[1:3])
    arguments = pillow_arguments(part, warp)
    result.append(Candidate("Pillow, 1 process", len(part), functools.partial(pillow_warp, *arguments)))
    jobs = [arguments] * processes
    every = functools.partial(pool.starmap, pillow_warp, jobs, chunksize=1)
    result.append(Candidate(f"Pillow, {processes} processes", processes * len(part), every))
    return result


def _one_by_one(call: Callable[[], jax.Array]) -> None:
    for _ in range(_STEPS):
        call().block_until_ready()


def measure(all_candidates: list[Candidate], rounds: int) -> dict[str, np.ndarray]:
    """Images per second by name, [rounds]; every round times each candidate once, after a round that does not count."""
    rates: dict[str, list[float]] = {candidate.name: [] for candidate in all_candidates}
    for number in range(rounds + 1):
        for candidate in all_candidates:
            start = time.perf_counter()
            jax.block_until_ready(candidate.call())
            seconds = time.perf_counter() - start
            if number > 0:
                rates[candidate.name].append(candidate.images / seconds)
    return {name: np.array(values) for name, values in rates.items()}


def main(arguments: list[str] | None = None) -> None:
    """Read the command line (`arguments`, or the process's own), measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help=".npz with uint8 'train_images' [N, H, W]")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--rounds", type=int, default=40, help="how often each is timed")
    parser.add_argument("--processes", type=int, default=2, help="processes of the larger Pillow pipeline")
    options = parser.parse_args(arguments)
    images = np.load(options.data)["train_images"][: max(_PER_PROCESS, options.batch), ..., None]
    # Spawned, since a process that runs JAX's threads must not be forked.
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        rates = measure(candidates(images, options.batch, pool, options.processes), options.rounds)
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind}), batch {options.batch}")
    print(f"{'':32}  images/s: median   10th to 90th percentile   ms per batch")
    for name, values in rates.items():
        low, median, high = np.percentile(values, [10, 50, 90])
        print(f"{name:32} {median:17,.0f} {low:13,.0f} to {high:9,.0f} {1e3 * options.batch / median:14.3f}")


if __name__ == "__main__":
    main()
