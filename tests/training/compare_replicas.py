"""Run as a script, with 4 simulated devices: a jitted step, one under shard_map and one under pmap, into one .npz.

Under shard_map and pmap the model sees a device's part of the batch. For statistics of the whole batch the head's norm
is given their exchange by hand, which is what such a step needs and a jitted one does not.
"""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from steps_support import make_programs

from pspinal_jax.heads import ProgressiveSpinalHead
from pspinal_jax.layers import norm
from pspinal_jax.models import Classifier
from pspinal_jax.training import keys
from pspinal_jax.training.optimizers import make_optimizer
from pspinal_jax.training.state import EpochMetrics
from pspinal_jax.training.step import EpochPlan, cross_entropy

BATCH, STEPS, RATE, DEVICES = 16, 5, 0.1, 4


@contextlib.contextmanager
def exchanged(axes):
    """Batch norm whose means are taken over the mapped `axes` too."""
    update = norm.update_running

    def statistics(inputs):
        mean = jax.lax.pmean(jnp.mean(inputs, 0), axes)
        return mean, jax.lax.pmean(jnp.mean(jnp.square(inputs - mean), 0), axes)

    with contextlib.ExitStack() as stack:
        for name, function in (
            ("batch_statistics", statistics),
            ("update_running", lambda *arrays: update(*arrays[:-1], DEVICES * arrays[-1])),
        ):
            stack.callback(setattr, norm, name, getattr(norm, name))
            setattr(norm, name, function)
        yield


def flat(*trees):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trees)])


def chunked(model, inputs, labels, **options):
    """Through the programs of a run."""
    optimizer = make_optimizer(momentum=0.0)
    run = make_programs(model, optimizer, inputs.shape[1:], inputs.dtype, BATCH, BATCH, **options)
    seed = run.replicate(np.uint32(0))
    plan = run.replicate(EpochPlan(np.arange(len(labels), dtype=np.int32), np.full(STEPS, RATE)))
    start, totals = run.init(seed), run.replicate(EpochMetrics.zero()._replace(loss=np.zeros(())))
    initial = jax.device_get((start.params, start.batch_stats))
    data = run.replicate((inputs, labels))
    state, totals = run.chunk(start, totals, seed, plan, np.int32(0), np.int32(STEPS), data)
    return initial, flat(state.params, state.batch_stats, totals)


def pmapped(model, initial, inputs, labels):
    """The old way, written out: replicated arrays with a leading axis of devices, gradients averaged by hand."""

    def step(params, stats, images, labels, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("replica"))

        def loss(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return cross_entropy(logits, labels).mean(), (new["batch_stats"], logits)

        (value, (stats, logits)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        value, stats, gradients = jax.lax.pmean((value, stats, gradients), "replica")
        correct = jax.lax.psum(jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32), "replica")
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), stats, value, correct

    run = jax.pmap(step, axis_name="replica")
    params, stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), initial)
    losses, sums = 0.0, 0
    for index in range(STEPS):
        rows = slice(index * BATCH, (index + 1) * BATCH)
        parts = [array[rows].reshape(DEVICES, -1, *array.shape[1:]) for array in (inputs, labels)]
        key = jnp.stack([keys.step_key(0, index)] * DEVICES)
        params, stats, value, correct = run(params, stats, *parts, key)
        losses, sums = losses + float(value[0]) * BATCH, sums + int(correct[0])
    first = jax.tree.map(lambda leaf: np.asarray(leaf[0]), (params, stats))
    return flat(*first, EpochMetrics.zero()._replace(loss=losses, metrics={"correct": sums}, count=STEPS * BATCH))


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(STEPS * BATCH, 6))
    labels = rng.integers(0, 4, len(inputs)).astype(np.int32)

    def model(rate):
        return Classifier(
            head=ProgressiveSpinalHead(4, 5, 2, rate, norm="batch", param_dtype="float64"), dtype="float64"
        )

    results = {}
    initial, results["global_jit"] = chunked(model(0.0), inputs, labels)
    with exchanged(("data", "fsdp")):
        results["global_shard_map"] = chunked(model(0.0), inputs, labels, batch_norm_per_device=True)[1]
    with exchanged("replica"):
        results["global_pmap"] = pmapped(model(0.0), initial, inputs, labels)
    results["device_shard_map"] = chunked(model(0.2), inputs, labels, batch_norm_per_device=True)[1]
    results["device_pmap"] = pmapped(model(0.2), initial, inputs, labels)
    results["device_no_dropout"] = chunked(model(0.0), inputs, labels, batch_norm_per_device=True)[1]
    np.savez(sys.argv[1], **results)


main()
