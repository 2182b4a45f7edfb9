"""What training carries from step to step."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from pspinal_jax.training import keys


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: int32 scalar, steps taken since the start of the run.
      params: parameters of the model.
      batch_stats: its running statistics, {} where it has none.
      opt_state: state of the optimiser.
      ema: moving averages of params and batch_stats, {'params': .., 'batch_stats': ..}, what is frozen left out; {}
        where none are kept.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What is evaluated, selected and kept: params and batch_stats, their averages where there are any."""
        current = {"params": self.params, "batch_stats": self.batch_stats}
        return {name: {**tree, **self.ema.get(name, {})} for name, tree in current.items()}


@flax.struct.dataclass
class Totals:
    """Sums over the training examples of an epoch so far.

    Attributes:
      loss: float32, sum of the examples' losses.
      metrics: sums of the examples' metrics, by name.
      count: int32, examples seen.
      bad_step: int32, the first step of the run (from 0) in this epoch whose loss, gradients or running statistics
        were not finite; -1 for none.
      skipped: int32, steps left out because of that; their examples are not in the other sums.
    """

    loss: Any
    metrics: dict[str, Any]
    count: Any
    bad_step: Any
    skipped: Any

    @classmethod
    def zero(cls, metrics: Mapping[str, Any] = MappingProxyType({"correct": jnp.int32})) -> "Totals":
        """Sums over nothing; `metrics` tells the dtypes of theirs."""
        # An array each: totals are donated, and no buffer may be donated twice.
        count, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        sums = {name: jnp.zeros((), dtype) for name, dtype in metrics.items()}
        return cls(jnp.zeros((), jnp.float32), sums, count, jnp.full((), -1, jnp.int32), skipped)

    def add(self, loss: jax.Array, metrics: dict[str, jax.Array], count: int) -> "Totals":
        """These sums and a batch's: its mean loss, the sums of its metrics, its number of examples."""
        return self.replace(  # type: ignore[attr-defined]
            loss=self.loss + loss.astype(self.loss.dtype) * count,
            metrics={name: value + metrics[name] for name, value in self.metrics.items()},
            count=self.count + count,
        )

    @property
    def sums(self) -> dict[str, Any]:
        """All of them by name, the metrics among them: as they are recorded."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**named.pop("metrics"), **named}


def averaged(ema: dict[str, Any], params: Any, batch_stats: Any, step: jax.Array, decay: float) -> dict[str, Any]:
    """The moving averages after step `step`, counted from 0.

    ema + (1 - d) (new - ema), where d = min(decay, (1 + t) / (10 + t)) after t = step + 1 steps: the first steps, close
    to where the run began, are forgotten soon, as in TensorFlow's ExponentialMovingAverage with num_updates. Running
    statistics are averaged alike, so that they belong to the averaged parameters.
    """
    steps = step.astype(jnp.float32) + 1
    weight = 1 - jnp.minimum(decay, (1 + steps) / (10 + steps))
    new = {"params": params, "batch_stats": batch_stats}
    new = {name: {entry: new[name][entry] for entry in tree} for name, tree in ema.items()}
    return jax.tree.map(lambda old, now: old + weight.astype(old.dtype) * (now - old), ema, new)


def start_average(params: Any, batch_stats: Any, frozen: tuple[str, ...]) -> dict[str, Any]:
    """The moving averages that a run starts from: copies."""
    trees = {"params": trainable(params, frozen), "batch_stats": trainable(batch_stats, frozen)}
    return jax.tree.map(jnp.copy, trees)


def trainable(params: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Any]:
    """`params` without the entries at the top that are `frozen`."""
    return {name: entry for name, entry in params.items() if name not in frozen}


def init_state(
    model: Any,
    optimizer: optax.GradientTransformation,
    inputs: Any,
    frozen: tuple[str, ...],
    keeps_average: bool,
    seed: jax.Array,
) -> TrainState:
    """The state that a run with `seed` (uint32 scalar) starts from; `inputs` tells a batch's shapes and dtypes."""
    batch = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), inputs)
    variables = model.init(keys.init_key(seed), batch, train=False)
    params = variables["params"]
    opt_state = optimizer.init(trainable(params, frozen))
    batch_stats = variables.get("batch_stats", {})
    ema = start_average(params, batch_stats, frozen) if keeps_average else {}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, ema)
