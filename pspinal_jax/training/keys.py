"""Every random number of a run, as a function of (seed, epoch, step): resuming equals never having stopped."""

import jax
import jax.numpy as jnp

Seed = jax.Array | int


def init_key(seed: Seed) -> jax.Array:
    """Key of the initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), 0)


def step_key(seed: Seed, step: jax.Array | int) -> jax.Array:
    """Key of all random numbers of training step `step`, counted from the start of the run."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)


def step_keys(seed: Seed, first: jax.Array | int, count: int) -> jax.Array:
    """`step_key` of `count` steps from step `first` on, [count]."""
    return jax.vmap(step_key, (None, 0))(seed, first + jnp.arange(count))


def augment_key(step_key: jax.Array) -> jax.Array:
    """Key of a step's augmentation, apart from the one of its dropout masks."""
    return jax.random.fold_in(step_key, 1 << 20)


def epoch_order(seed: Seed, epoch: jax.Array | int, num_examples: int) -> jax.Array:
    """Order int32 [num_examples] in which epoch `epoch` visits the training examples."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2), epoch)
    return jax.random.permutation(key, num_examples)
