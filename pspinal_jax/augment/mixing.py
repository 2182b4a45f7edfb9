"""Mixup and cutmix, which mix the training examples of a batch with each other, and their labels.

mixup: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412, section 2:
x = lam x_i + (1 - lam) x_j, the loss lam l(x, y_i) + (1 - lam) l(x, y_j), lam from Beta(alpha, alpha). There is one lam
per batch, and j is a permutation of the batch, as in the authors' program.
cutmix: Yun, Han, Oh, Chun, Choe, Yoo, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
Features", arXiv:1905.04899, section 3.1: a box of sides W sqrt(1 - lam) and H sqrt(1 - lam) about a uniform centre,
clipped at the edges, comes from x_j; lam is then the fraction of the area that remains of x_i.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_CHANCE_OF_CUTMIX = 0.5
"""Where both are asked for."""


class Mixed(NamedTuple):
    """The labels of a mixed batch.

    Attributes:
      labels: integers [B], labels of the examples.
      others: integers [B], labels of the examples that they were mixed with.
      lam: float32 [B], 0 .. 1, the weight of `labels`; the others have 1 - lam.
    """

    labels: jax.Array
    others: jax.Array
    lam: jax.Array

    @property
    def main(self) -> jax.Array:
        """Integers [B], the label with the larger weight."""
        return jnp.where(self.lam >= 0.5, self.labels, self.others)


def mix(
    key: jax.Array, inputs: jax.Array, labels: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, Mixed]:
    """Mix each example of a batch with another one; with both methods, by one of them at random.

    Args:
      key: a JAX random key.
      inputs: images [B, H, W, C] or, for mixup alone, examples of any shape [B, ...]. Integers are rounded to the
        nearest.
      labels: integers [B].
      mixup: alpha of mixup, 0 for none.
      cutmix: alpha of cutmix, 0 for none.

    Returns:
      (inputs of the same shape and dtype, their `Mixed` labels).

    Raises:
      ValueError: if both are 0, either is negative, or cutmix gets inputs without height and width.
    """
    if min(mixup, cutmix) < 0 or not mixup + cutmix > 0:
        raise ValueError(f"mixup and cutmix must be at least 0, and one of them above, got {mixup!r} and {cutmix!r}")
    if cutmix and inputs.ndim != 4:
        raise ValueError(f"cutmix takes images [B, H, W, C], got {inputs.shape}")
    order_key, mixup_key, cutmix_key, choice_key = jax.random.split(key, 4)
    order = jax.random.permutation(order_key, len(labels))
    others = inputs[order]
    if not cutmix:
        mixed, lam = blend(mixup_key, inputs, others, mixup)
    elif not mixup:
        mixed, lam = cut(cutmix_key, inputs, others, cutmix)
    else:
        chosen = jax.random.uniform(choice_key) < _CHANCE_OF_CUTMIX
        blended, blended_lam = blend(mixup_key, inputs, others, mixup)
        pasted, pasted_lam = cut(cutmix_key, inputs, others, cutmix)
        mixed, lam = jnp.where(chosen, pasted, blended), jnp.where(chosen, pasted_lam, blended_lam)
    return mixed, Mixed(labels, labels[order], jnp.broadcast_to(lam, labels.shape))


def blend(key: jax.Array, inputs: jax.Array, others: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Mixup: (lam * inputs + (1 - lam) * others, lam), float32 scalar from Beta(alpha, alpha)."""
    lam = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    dtype = jnp.promote_types(inputs.dtype, jnp.float32)
    blended = lam * inputs.astype(dtype) + (1 - lam) * others.astype(dtype)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        blended = jnp.rint(blended)
    return blended.astype(inputs.dtype), lam


def cut(key: jax.Array, images: jax.Array, others: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Cutmix: `images` [B, H, W, C] with one box of `others`, and the part of the area that is left of them."""
    lam_key, row_key, column_key = jax.random.split(key, 3)
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - jax.random.beta(lam_key, alpha, alpha, dtype=jnp.float32))

    def within(key: jax.Array, length: int) -> jax.Array:
        """Which rows, or columns, the box covers, bool [length]."""
        half = jnp.floor(length * side).astype(jnp.int32) // 2
        centre = jax.random.randint(key, (), 0, length)
        along = jnp.arange(length)
        return (along >= centre - half) & (along < centre + half)

    rows, columns = within(row_key, height), within(column_key, width)
    box = rows[:, None] & columns[None, :]
    lam = 1 - jnp.sum(rows) * jnp.sum(columns) / (height * width)
    return jnp.where(box[None, :, :, None], others, images), lam.astype(jnp.float32)
