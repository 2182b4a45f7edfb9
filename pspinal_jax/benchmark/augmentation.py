"""`benchmark augmentation`: images augmented a second inside a compiled loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.augment import augment
from pspinal_jax.benchmark.measurement import Case, Entry, Settings, table
from pspinal_jax.benchmark.timing import time_interleaved


def cases(settings: Settings) -> list[Case]:
    """Perspective and rotation of 28x28 images, by batch size."""
    return [(f"batch {batch}", partial(_case, settings, batch)) for batch in (64, 1024)]


def _case(settings: Settings, batch: int) -> list[Entry]:
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (batch, 28, 28, 1), np.uint8))

    @jax.jit
    def loop(images: jax.Array, count: jax.Array) -> jax.Array:
        def body(index: jax.Array, state: jax.Array) -> jax.Array:
            return augment(jax.random.fold_in(jax.random.key(0), index), state)

        return jax.lax.fori_loop(0, count, body, images)

    work = {"loop": lambda count: jax.block_until_ready(loop(images, np.int32(count)))}
    timing = time_interleaved(work, rounds=settings.rounds, seconds_per_round=settings.seconds_per_round)["loop"]
    rates = batch / timing.seconds
    row = [batch, 1e3 * float(np.median(timing.seconds)), round(float(np.median(rates)))]
    bars = {"images/s": {f"batch {batch}": rates.tolist()}}
    return [table("Perspective and rotation of 28x28 images", ["batch", "ms", "images/s"], [row], bars)]
