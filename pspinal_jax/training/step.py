"""A training step and an evaluation step as pure functions of arrays, and many steps as one program over data on the
devices.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from pspinal_jax.augment.mixing import Mixed
from pspinal_jax.training import keys
from pspinal_jax.training.state import EpochMetrics, Step, TrainState, averaged, trainable

Apply = Callable[..., Any]
"""linen's ``model.apply``."""


MAX_CHECKED_ENTRIES = 8192
"""Larger gradients are not checked for being finite, which would make a step of the MNIST row 15 % longer. If one of
them is not finite, neither is the next loss, and almost never the gradient of its layer's bias or norm."""


Loss = Callable[[jax.Array, Any], jax.Array]
"""(logits, targets) -> losses [N] of the examples, or their mean, a scalar."""
Metrics = Mapping[str, Callable[[jax.Array, Any], jax.Array]]
"""Name -> (logits, labels) -> values [N] of the examples, or their mean, a scalar."""


class Evaluation(NamedTuple):
    """Result of evaluating a batch or a split.

    Attributes:
      loss: float32, sum of the examples' losses.
      metrics: name -> sum of the examples' values.
      predictions: int32 [N], the most probable class of each example, including padding.
    """

    loss: jax.Array
    metrics: dict[str, jax.Array]
    predictions: jax.Array


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether the largest of the logits [N, C] is the label's: bool [N]."""
    return jnp.argmax(logits, -1) == labels


CLASSIFICATION: Metrics = {"correct": correct}


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float | jax.Array = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example.

    Args:
      logits: [N, C]; computed in float32 or wider.
      labels: integers [N].
      label_smoothing: fraction of the target for all C classes evenly; a number, or a scalar array.

    Returns:
      [N], in nats.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if isinstance(label_smoothing, jax.Array) or label_smoothing:
        uniform = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * uniform
    return losses


def target_losses(
    logits: jax.Array,
    targets: jax.Array | Mixed,
    label_smoothing: float | jax.Array = 0.0,
    class_weights: tuple[float, ...] | None = None,
) -> jax.Array:
    """Training losses [N]; for `Mixed` labels, the losses of both labels weighted by lam.

    Args:
      logits: [N, C].
      targets: labels, integers [N], or `Mixed` labels.
      label_smoothing: see `cross_entropy`.
      class_weights: C factors of the losses, by class; None for 1.
    """
    if isinstance(targets, Mixed):
        own, other = (
            target_losses(logits, labels, label_smoothing, class_weights) for labels in (targets.labels, targets.others)
        )
        return targets.lam * own + (1 - targets.lam) * other
    losses = cross_entropy(logits, targets, label_smoothing)
    return losses if class_weights is None else losses * jnp.asarray(class_weights, losses.dtype)[targets]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A gradient step: (state, totals, batch, learning_rate, key) -> (state, totals).

    Attributes:
      apply: the model's ``apply``, as in linen.
      optimizer: optimizer, which returns the direction of descent.
      loss: loss of (logits, targets). Targets are labels, or `Mixed` labels if `mix` makes them. The step minimises the
        mean over the batch.
      metrics: metrics summed over the epoch during training; for `Mixed` labels they use the label with the larger lam.
      augment: (key, inputs) -> inputs, applied to the batch on the device; None for no augmentation.
      mix: (key, inputs, labels) -> (inputs, targets), applied after `augment`; None for no mixing.
      ema_decay: decay of the state's moving averages, see `averaged`; ignored if the state has none.
      frozen: top-level entries of `params` that are not trained; they have no gradient and no optimizer state.
      micro_batches: K, number of parts of B / K examples that the batch is split into to save memory. The gradient is
        their mean. Batch norm normalises each part separately.
      skip_nonfinite: if the loss, a gradient or a new running statistic is not finite, keep the state except for its
        step. Otherwise `EpochMetrics.bad_step` names the step, and the state is lost.
    """

    apply: Apply
    optimizer: optax.GradientTransformation
    loss: Loss = cross_entropy
    metrics: Metrics = dataclasses.field(default_factory=lambda: CLASSIFICATION)
    augment: Callable[[jax.Array, Any], Any] | None = None
    mix: Callable[[jax.Array, Any, Any], tuple[Any, Any]] | None = None
    ema_decay: float = 0.0
    frozen: tuple[str, ...] = ()
    micro_batches: int = 1
    skip_nonfinite: bool = False

    def __call__(
        self, state: TrainState, totals: EpochMetrics, batch: tuple[Any, Any], learning_rate: jax.Array, key: jax.Array
    ) -> tuple[TrainState, EpochMetrics]:
        """Take one step, and return the state and the epoch's sums.

        Args:
          state: state before the step.
          totals: the epoch's sums before the step.
          batch: (inputs [B, ...], labels [B, ...]).
          learning_rate: float32 scalar.
          key: key of the step's random numbers.
        """
        return self.descend(state, totals, self.prepare(batch, key), learning_rate, key)

    def init(self, model: Any, inputs: Any, seed: jax.Array) -> TrainState:
        """The initial state of `model` with `seed` (uint32 scalar), for `inputs` of these shapes and dtypes."""
        batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
        variables = model.init(keys.init_key(seed), batch, train=False)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        moving, ema = trainable(params, self.frozen), {}
        if self.ema_decay:
            ema = jax.tree.map(jnp.copy, {"params": moving, "batch_stats": trainable(batch_stats, self.frozen)})
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, self.optimizer.init(moving), ema)

    def prepare(self, batch: tuple[Any, Any], key: jax.Array) -> tuple[Any, Any]:
        """The batch, augmented and mixed."""
        if self.augment is not None:
            batch = (self.augment(keys.augment_key(key), batch[0]), batch[1])
        return batch if self.mix is None else self.mix(keys.mix_key(key), *batch)

    def descend(
        self,
        state: TrainState,
        totals: EpochMetrics,
        batch: tuple[Any, Any],
        learning_rate: jax.Array,
        key: jax.Array,
        *,
        axes: tuple[str, ...] = (),
    ) -> tuple[TrainState, EpochMetrics]:
        """Take a step on a prepared batch.

        With `axes`, the names of mapped axes inside `jax.shard_map`, `batch` is this device's part of the batch, and
        batch norm sees only that part. The step is still that of the whole batch: loss, gradients and running
        statistics are means over the devices. Every device draws its own dropout masks.
        """
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if axes:
            key = jax.random.fold_in(key, jax.lax.axis_index(axes))
        gradients_of = partial(self._loss_and_gradients, axes)
        if self.micro_batches == 1:
            loss, metrics, gradients, batch_stats = gradients_of(variables, batch, key)
        else:
            loss, metrics, gradients, batch_stats = _accumulate(gradients_of, self.micro_batches, variables, batch, key)
        new_state = self._moved(state, gradients, batch_stats, learning_rate)
        finite = _all_finite(loss, gradients, batch_stats, None if self.skip_nonfinite else MAX_CHECKED_ENTRIES)
        totals = totals._replace(bad_step=jnp.where(finite | (totals.bad_step >= 0), totals.bad_step, state.step))
        rows = count_rows(batch) * (jax.lax.axis_size(axes) if axes else 1)
        new_totals = totals._replace(
            loss=totals.loss + loss.astype(totals.loss.dtype) * rows,
            metrics={name: value + metrics[name] for name, value in totals.metrics.items()},
            count=totals.count + rows,
        )
        if not self.skip_nonfinite:
            return new_state, new_totals
        same = state.replace(step=new_state.step)  # type: ignore[attr-defined]
        left_out = totals._replace(skipped=totals.skipped + 1)
        return jax.tree.map(partial(jnp.where, finite), (new_state, new_totals), (same, left_out))

    def _moved(self, state: TrainState, gradients: Any, batch_stats: Any, learning_rate: jax.Array) -> TrainState:
        """`state` one step on, with the new running statistics `batch_stats`."""
        moving = trainable(state.params, self.frozen)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies Python's floats with its int32 counts
            direction, opt_state = self.optimizer.update(gradients, state.opt_state, moving)
        moved = jax.tree.map(lambda p, d: p - learning_rate.astype(p.dtype) * d, moving, direction)
        params = {**state.params, **moved}
        ema = averaged(state.ema, params, batch_stats, state.step, self.ema_decay) if state.ema else state.ema
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema)

    def _loss_and_gradients(
        self, axes: tuple[str, ...], variables: dict[str, Any], batch: tuple[Any, Any], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
        """(mean loss, sums of metrics, gradients of what moves, new running statistics) of a batch, over all `axes`."""
        inputs, targets = batch

        def mean_loss(moving: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            model = {"params": {**variables["params"], **moving}, "batch_stats": variables["batch_stats"]}
            if axes:  # from here on each device's own, so that the gradient is summed over devices on its way back
                model = jax.lax.pcast(model, axes, to="varying")
            logits, updated = self.apply(model, inputs, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
            loss, batch_stats = self.loss(logits, targets).mean(), updated.get("batch_stats", {})
            if axes:  # the loss, not the gradients: those of parameters on all devices are summed already
                loss, batch_stats = jax.lax.pmean((loss, batch_stats), axes)
            return loss, (batch_stats, logits)

        moving = trainable(variables["params"], self.frozen)
        (loss, (batch_stats, logits)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(moving)
        labels = targets.main if isinstance(targets, Mixed) else targets
        sums = {name: _total(each_example(metric, logits, labels)) for name, metric in self.metrics.items()}
        return loss, jax.lax.psum(sums, axes) if axes else sums, gradients, batch_stats


def count_rows(batch: tuple[Any, Any]) -> int:
    """Number of examples in a batch."""
    return len(jax.tree.leaves(batch[0])[0])


def each_example(function: Callable[[jax.Array, Any], jax.Array], logits: jax.Array, labels: Any) -> jax.Array:
    """The value [N] of a loss or a metric for each example.

    Values of more axes are averaged over all but the first. A scalar is taken for the mean over the batch, and the
    function is called for each example alone.
    """
    values = function(logits, labels)
    if values.ndim > 1:
        return values.reshape(len(values), -1).mean(1)
    if values.ndim == 1:
        return values
    alone = jax.tree.map(lambda array: array[:, None], (logits, labels))
    return jax.vmap(function)(*alone)


def _total(values: jax.Array) -> jax.Array:
    """The sum, of counts as int32, of anything else as float32."""
    counts = jnp.issubdtype(values.dtype, jnp.integer) or values.dtype == jnp.bool_
    return jnp.sum(values, dtype=jnp.int32 if counts else jnp.float32)


def _all_finite(loss: jax.Array, gradients: Any, batch_stats: Any, most_entries: int | None) -> jax.Array:
    """Whether loss, running statistics and gradients are finite, of these those of at most `most_entries` entries.

    A sum is not finite where one of its terms is not. A batch whose variance overflows has a finite loss and finite
    gradients: batch norm makes zeros of it.
    """
    checked = [leaf for leaf in jax.tree.leaves(gradients) if most_entries is None or leaf.size <= most_entries]
    checked += jax.tree.leaves(batch_stats)
    sums = [loss, *(jnp.sum(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in checked)]
    return jnp.all(jnp.isfinite(jnp.stack([total.astype(jnp.float32) for total in sums])))


def _accumulate(
    loss_and_gradients: Callable[..., Any], parts: int, variables: Any, batch: Any, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
    """What `loss_and_gradients` gives, as means (metrics: as sums) over `parts` micro-batches."""
    # Every K-th example, so that each device splits its own part of a sharded batch.
    split = jax.tree.map(lambda a: a.reshape(len(a) // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def body(carry: Any, part: Any) -> Any:
        (loss, metrics, gradients), batch_stats = carry
        index, micro_batch = part
        model = {"params": variables["params"], "batch_stats": batch_stats}
        *sums, batch_stats = loss_and_gradients(model, micro_batch, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, (loss, metrics, gradients), tuple(sums)), batch_stats), None

    shapes = jax.eval_shape(loss_and_gradients, variables, jax.tree.map(lambda a: a[0], split), key)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[:3])
    start = (nothing, variables["batch_stats"])
    ((loss, metrics, gradients), batch_stats), _ = jax.lax.scan(body, start, (jnp.arange(parts), split))
    return loss / parts, metrics, jax.tree.map(lambda g: g / parts, gradients), batch_stats


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """An evaluation step, which sums loss and metrics over a batch.

    Attributes:
      apply: the model's ``apply``, as in linen.
      loss: loss of (logits, labels).
      metrics: metrics of (logits, labels).
      classifies: whether the logits are [N, C] of C classes, so that there are predictions.
    """

    apply: Apply
    loss: Loss = cross_entropy
    metrics: Metrics = dataclasses.field(default_factory=lambda: CLASSIFICATION)
    classifies: bool = True

    def __call__(self, variables: Any, batch: tuple[Any, Any], mask: jax.Array) -> Evaluation:
        """The sums over the examples of `batch` (inputs [B, ...], labels [B, ...]) where `mask` bool [B] is True."""
        inputs, labels = batch
        logits = self.apply(variables, inputs, train=False)
        nothing = jnp.zeros(len(mask), jnp.int32)

        def masked(function: Callable[[jax.Array, Any], jax.Array]) -> jax.Array:
            values = each_example(function, logits, labels)
            return jnp.where(mask, values, jnp.zeros((), values.dtype))

        return Evaluation(
            loss=jnp.sum(masked(self.loss)),
            metrics={name: _total(masked(metric)) for name, metric in self.metrics.items()},
            predictions=jnp.argmax(logits, -1).astype(jnp.int32) if self.classifies else nothing,
        )


Batch = tuple[Any, Any]
"""(inputs, labels), on the host or on devices."""


class EpochPlan(NamedTuple):
    """The plan of an epoch, as arrays.

    Attributes:
      order: int32 [N], order of the examples; entries beyond the epoch's examples are not used.
      learning_rates: float32 [S], learning rate of each step.
    """

    order: Any
    learning_rates: Any


def run_chunk(
    step: Step,
    batch_size: int,
    stride: int,
    block: int,
    state: TrainState,
    totals: EpochMetrics,
    seed: jax.Array,
    plan: EpochPlan,
    first: jax.Array,
    num_steps: jax.Array,
    data: Batch,
) -> tuple[TrainState, EpochMetrics]:
    """Take consecutive training steps of an epoch.

    The number of steps is an operand of the program. One compilation therefore serves every chunk length, and results
    do not depend on how an epoch is split into chunks, since every length runs the same instructions. (A lax.scan is
    the same loop with a fixed length.)

    XLA's GPU runtime copies the condition of such a loop to the host at every step and waits for it. With blocks, the
    compiler knows the length of the inner loop. Steps of the last block beyond the chunk are discarded, which costs a
    selection between the old and the new state at every step.

    Args:
      step: the training step.
      batch_size: examples per step.
      stride: start of step i in the order, divided by i; `batch_size` except for a smaller last batch.
      block: number of steps in a block; 1 for a plain loop.
      state: state before the chunk.
      totals: the epoch's sums before the chunk.
      seed: uint32 scalar.
      plan: the epoch's order and learning rates.
      first: int32 scalar, index of the chunk's first step in the epoch.
      num_steps: int32 scalar, number of steps.
      data: all training examples, (inputs [N, ...], labels [N]).

    Returns:
      (state, totals) after the chunk.
    """
    # All keys of the epoch at once: on CPU the few dozen tiny kernels of a key cost as much as a layer's product.
    steps = state.step - first + jnp.arange(len(plan.learning_rates))
    step_keys = jax.vmap(keys.step_key, (None, 0))(seed, steps)

    def body(index: jax.Array, carry: tuple[TrainState, EpochMetrics]) -> tuple[TrainState, EpochMetrics]:
        state, totals = carry
        rows = lax.dynamic_slice(plan.order, (index * stride,), (batch_size,))
        batch = jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), data)
        return step(state, totals, batch, plan.learning_rates[index], step_keys[index])

    end = first + num_steps
    if block == 1:
        return lax.fori_loop(first, end, body, (state, totals))

    def take_block(number: jax.Array, carry: tuple[TrainState, EpochMetrics]) -> tuple[TrainState, EpochMetrics]:
        def take(offset: jax.Array, carry: tuple[TrainState, EpochMetrics]) -> tuple[TrainState, EpochMetrics]:
            index = first + number * block + offset
            return jax.tree.map(partial(jnp.where, index < end), body(index, carry), carry)

        return lax.fori_loop(0, block, take, carry)

    return lax.fori_loop(0, (num_steps + block - 1) // block, take_block, (state, totals))


def evaluate_split(
    step: Callable[[Batch, jax.Array], Evaluation], batch_size: int, data: Batch, count: jax.Array, whole: bool = False
) -> Evaluation:
    """Exact evaluation of a split whose arrays are padded to whole batches.

    Args:
      step: evaluation of one batch (inputs, labels) under a mask bool [B].
      batch_size: B.
      data: (inputs [M, ...], labels [M]), M a multiple of B.
      count: int32 scalar, number of real examples among the M; batches without a real example are skipped.
      whole: compute all batches, so that the compiler knows their number; see `run_chunk`.

    Returns:
      Sums over the real examples, and the predictions [M].
    """
    length = count_rows(data)

    def body(index: jax.Array, sums: Evaluation) -> Evaluation:
        start = index * batch_size
        batch = jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, start, batch_size), data)
        result = step(batch, start + jnp.arange(batch_size) < count)
        return Evaluation(
            loss=sums.loss + result.loss.astype(sums.loss.dtype),
            metrics=jax.tree.map(jnp.add, sums.metrics, result.metrics),
            predictions=lax.dynamic_update_slice_in_dim(sums.predictions, result.predictions, start, 0),
        )

    first = jax.tree.map(lambda array: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype), data)
    sums = jax.eval_shape(step, first, jax.ShapeDtypeStruct((batch_size,), bool))
    metrics = jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), sums.metrics)
    nothing = Evaluation(jnp.zeros((), jnp.float32), metrics, jnp.zeros(length, jnp.int32))
    batches = length // batch_size if whole else (count + batch_size - 1) // batch_size
    return lax.fori_loop(0, batches, body, nothing)
