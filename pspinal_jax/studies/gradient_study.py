"""The gradient highway study: several networks at several depths, from initialisation through training."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pspinal_jax.heads import DenseHead, ProgressiveSpinalHead, SpinalHead
from pspinal_jax.layers.linear import Tree
from pspinal_jax.studies.gradients import PlainStack, gradient_norms

NETWORKS = {
    "progressive": "ProgressiveSpinalNet: every layer and the output see the features and all earlier layers",
    "spinal": "SpinalNet: half of the features and the layer before; the output sees all layers",
    "plain": "plain stack: every layer sees the layer before, the output the last; the heads' initialisation",
    "plain, He": "the same plain stack, kernels normal(0, 2 / fan_in), biases 0",
}
DENSE = "dense: one linear layer, no depth"
MEASURED_EXAMPLES = 256
_RUN_A_FEW_TIMES = {"xla_backend_optimization_level": 0}
"""Compiler options for what is compiled in seconds and runs in milliseconds."""
_DEEP = 8
"""Layers from which on the progressive head trains as the scan, whose program does not grow with them."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured; see the flags of `pspinal-jax gradients`."""

    depths: tuple[int, ...]
    width: int
    num_seeds: int
    epochs: int
    every: int
    batch_size: int
    learning_rate: float
    norm: Literal["batch"] | None


@dataclasses.dataclass(frozen=True)
class Examples:
    """float32 features [N, D] and int32 labels [N] of both splits."""

    train_features: np.ndarray
    train_labels: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def make_network(name: str, depth: int, num_classes: int, study: Study) -> nn.Module:
    """The network `name` of `NETWORKS` with `depth` hidden layers, without dropout; 'dense' has none."""
    if name == "dense":
        return DenseHead(num_classes)
    common: dict[str, Any] = {"num_classes": num_classes, "layer_width": study.width, "num_layers": depth}
    common["norm"] = study.norm
    if name == "progressive":
        return ProgressiveSpinalHead(
            **common, dropout_rate=0.0, implementation="scan" if depth >= _DEEP else "unrolled"
        )
    if name == "spinal":
        return SpinalHead(**common, dropout_rate=0.0)
    if name == "plain":
        return PlainStack(**common)
    return PlainStack(**common, kernel_init=nn.initializers.he_normal(), bias_init=nn.initializers.zeros)


def follow(head: nn.Module, examples: Examples, study: Study) -> dict[str, np.ndarray]:
    """Train `head` with every seed, measuring at epoch 0, every `study.every` epochs and the last.

    Returns:
      epochs [E]; features, loss, test_accuracy [E, S]; pre_activations [E, S, L]; kernels [E, S, L + 1].
    """
    optimizer = optax.sgd(study.learning_rate, momentum=0.9)
    keys = jax.vmap(jax.random.key)(jnp.arange(study.num_seeds))
    sample = examples.train_features[:1]

    def start(key: jax.Array) -> tuple[Tree, optax.OptState]:
        variables: Any = head.init(key, sample, train=False)
        return variables, optimizer.init(variables["params"])

    states = jax.jit(jax.vmap(start), compiler_options=_RUN_A_FEW_TIMES)(keys)
    measure, train_epoch = _measure(head, examples), _train_epoch(head, optimizer, examples, study.batch_size)
    at = sorted({*range(0, study.epochs + 1, study.every), study.epochs})
    measured = []
    for epoch in range(study.epochs + 1):
        if epoch in at:
            measured.append(jax.device_get(measure(states[0])))
        if epoch < study.epochs:
            states = train_epoch(states, keys, epoch)
    stacked: dict[str, np.ndarray] = {name: np.stack([each[name] for each in measured]) for name in measured[0]}
    return {"epochs": np.array(at), **stacked}


def _measure(head: nn.Module, examples: Examples) -> Callable[[Tree], dict[str, jax.Array]]:
    """The measurement of all seeds, as one program."""
    features, labels = (
        jnp.asarray(array[:MEASURED_EXAMPLES]) for array in (examples.train_features, examples.train_labels)
    )
    test_features, test_labels = jnp.asarray(examples.test_features), jnp.asarray(examples.test_labels)
    probed = head.clone(implementation="unrolled") if isinstance(head, ProgressiveSpinalHead) else head

    def measure(variables: Tree) -> dict[str, jax.Array]:
        logits: Any = head.apply(variables, test_features, train=False)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == test_labels)
        return {**gradient_norms(probed, variables, features, labels), "test_accuracy": accuracy}

    return jax.jit(jax.vmap(measure), compiler_options=_RUN_A_FEW_TIMES)


def _train_epoch(
    head: nn.Module, optimizer: optax.GradientTransformation, examples: Examples, batch_size: int
) -> Callable[..., Any]:
    """An epoch of all seeds, as one program; the order is a function of (seed, epoch), a last smaller batch is left."""
    features, labels = jnp.asarray(examples.train_features), jnp.asarray(examples.train_labels)
    steps = len(labels) // batch_size

    def step(state: tuple[Tree, Any], batch: jax.Array) -> tuple[tuple[Tree, Any], None]:
        variables, opt_state = state

        def loss_fn(params: Tree) -> tuple[jax.Array, Any]:
            given = {**variables, "params": params}
            logits, new = head.apply(given, features[batch], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean(), new

        grads, new = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **new, "params": params}, opt_state), None

    def epoch_of_one(state: tuple[Tree, Any], key: jax.Array, epoch: jax.Array) -> tuple[Tree, Any]:
        order = jax.random.permutation(jax.random.fold_in(key, epoch + 1), len(labels))
        batches = order[: steps * batch_size].reshape(steps, batch_size)
        return jax.lax.scan(step, state, batches)[0]

    return jax.jit(jax.vmap(epoch_of_one, in_axes=(0, 0, None)), donate_argnums=0)
