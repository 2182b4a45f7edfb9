"""Every random number of a run, as a function of (seed, epoch, step): resuming equals never having stopped."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pspinal_jax.distributed import put

Seed = jax.Array | int


def init_key(seed: Seed) -> jax.Array:
    """Key of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def step_key(seed: Seed, step: jax.Array | int) -> jax.Array:
    """Key of all random numbers of training step `step`, counted from the start of the run."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def augment_key(step_key: jax.Array) -> jax.Array:
    """Key of a step's augmentation, apart from the one of its dropout masks."""
    return jax.random.fold_in(step_key, 1 << 20)


def mix_key(step_key: jax.Array) -> jax.Array:
    """Key of what a step's examples are mixed with."""
    return jax.random.fold_in(step_key, (1 << 20) + 1)


def epoch_order(seed: Seed, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """Order int32 [num_examples] in which epoch `epoch` visits the training examples."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), epoch)
    return jax.random.permutation(key, num_examples)


def balanced_order(seed: Seed, epoch: jax.Array | int, labels: np.ndarray) -> jax.Array:
    """Order int32 [N] in which epoch `epoch` visits N examples of which it draws as many of every class.

    Of N examples in K classes, floor(N / K) of every class are drawn, and one more of some, which the epoch chooses. A
    class is gone through in an order of the epoch's own, and again from its beginning where it has fewer examples, so
    no example is drawn twice before all of its class are.

    Args:
      seed: of the run.
      epoch: from 0.
      labels: integers [N], on the host: the examples' classes.
    """
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    shuffled = epoch_order(seed, epoch, len(labels))
    by_class = shuffled[jnp.argsort(jnp.asarray(classes)[shuffled], stable=True)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 3), epoch)
    class_key, place_key = jax.random.split(key)
    turn, place = np.divmod(np.arange(len(labels)), len(sizes))
    drawn = jax.random.permutation(class_key, len(sizes))[place]
    chosen = by_class[jnp.asarray(starts)[drawn] + turn % jnp.asarray(sizes)[drawn]]
    return jax.random.permutation(place_key, chosen)


def make_order(
    subset: np.ndarray, length: int, vectorized: bool, shuffle: bool = True, balanced: np.ndarray | None = None
) -> Callable[..., jax.Array]:
    """(seed, epoch) -> int32 [length]: the examples `subset` in the epoch's order, then zeros.

    Without `shuffle` every epoch has the order of `subset`. With the labels [N] of all examples as `balanced`, the
    epoch draws as many of `subset`, evenly from its classes; see `balanced_order`.

    The fixed length lets every stage of a run, with its own subset, use the same compiled chunk.
    """
    if balanced is None:
        numbers = np.asarray(subset, np.int32)

        def shuffled(seed: jax.Array, epoch: jax.Array) -> jax.Array:
            return _order(length, shuffle, put(numbers, getattr(seed, "sharding", None)), seed, epoch)

        return shuffled
    classes = balanced[subset]

    def order(seed: jax.Array, epoch: jax.Array) -> jax.Array:
        visited = jnp.asarray(subset, jnp.int32)[balanced_order(seed, epoch, classes)]
        return jnp.pad(visited, (0, length - len(subset)))

    return jax.jit(jax.vmap(order, (0, None)) if vectorized else order)


@partial(jax.jit, static_argnums=(0, 1))
def _order(length: int, shuffle: bool, subset: jax.Array, seed: jax.Array, epoch: jax.Array) -> jax.Array:
    """See `make_order`; compiled once for all runs on as many examples."""
    if jnp.ndim(seed):
        return jax.vmap(partial(_order, length, shuffle, subset), (0, None))(seed, epoch)
    visited = subset[epoch_order(seed, epoch, len(subset))] if shuffle else subset
    return jnp.pad(visited, (0, length - len(subset)))
