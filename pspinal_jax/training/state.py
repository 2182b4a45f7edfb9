"""What training carries from step to step, and the layout of heads in it.

Inside a compiled chunk a head's variables have the layout that its implementation computes with. Outside (checkpoints,
evaluation, callbacks, the user's hands) there is only the documented tree. Converting moves numbers and computes
nothing, so results do not depend on where chunks begin and end.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from pspinal_jax.heads.layouts import Layout, convert_batch_stats, convert_params


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


class EpochMetrics(NamedTuple):
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
    def zero(cls, metrics: Mapping[str, Any] = MappingProxyType({"correct": jnp.int32})) -> "EpochMetrics":
        """Sums over nothing, those of `metrics` with these dtypes."""
        # An array each: they are donated, and no buffer may be donated twice.
        count, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
        sums = {name: jnp.zeros((), dtype) for name, dtype in metrics.items()}
        return cls(jnp.zeros((), jnp.float32), sums, count, jnp.full((), -1, jnp.int32), skipped)

    @property
    def by_name(self) -> dict[str, Any]:
        """All of them by name, the metrics among them: as they are recorded."""
        return {**self.metrics, **{name: value for name, value in self._asdict().items() if name != "metrics"}}


Step = Callable[..., tuple[TrainState, EpochMetrics]]
"""(state, sums of the epoch, ..) -> the same after one or several steps."""


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


def trainable(params: dict[str, Any], frozen: tuple[str, ...]) -> dict[str, Any]:
    """`params` without the entries at the top that are `frozen`."""
    return {name: entry for name, entry in params.items() if name not in frozen}


Layouts = Mapping[tuple[str, ...], Layout]
"""The layout of each head's variables, by their path from the collection on: ``("params", "head")``."""
_CONVERT = {"params": convert_params, "batch_stats": convert_batch_stats}
_PROBED_STEPS = 16


def head_layouts(layout: Layout, path: Sequence[str] = ("head",), statistics: Sequence[str] | None = None) -> Layouts:
    """The layout of one head, whose parameters and running statistics have these paths in their collections."""
    names = {"params": path, "batch_stats": path if statistics is None else statistics}
    return {} if layout == "tree" else {(name, *names[name]): layout for name in names}


def in_layouts(layouts: Layouts, frozen: tuple[str, ...], run: Step) -> Step:
    """`run(state, ..) -> (state, totals)` with its inside in `layouts`, and the documented tree going in and out.

    The optimiser's state covers the entries of the parameters that are not `frozen`.
    """
    if not layouts:
        return run

    def converted(state: TrainState, *arguments: Any) -> tuple[TrainState, EpochMetrics]:
        state, totals = run(convert_state(state, layouts, frozen), *arguments)
        return convert_state(state, dict.fromkeys(layouts, "tree"), frozen), totals

    return converted


def convert_state(state: TrainState, layouts: Layouts, frozen: tuple[str, ...] = ()) -> TrainState:
    """`state` with all that belongs to its heads in the given layouts, the optimiser's state included."""
    convert = {name: partial(_convert_heads, layouts, name) for name in _CONVERT}
    return TrainState(
        step=state.step,
        params=convert["params"](state.params),
        batch_stats=convert["batch_stats"](state.batch_stats),
        ema={name: convert[name](tree) for name, tree in state.ema.items()},
        opt_state=_convert_copies(convert["params"], trainable(state.params, frozen), state.opt_state),
    )


def _convert_heads(layouts: Layouts, collection: str, tree: Any) -> Any:
    for (name, *path), layout in layouts.items():
        if name == collection:
            tree = _convert_at(path, partial(_CONVERT[name], layout=layout), tree)
    return tree


def _convert_at(path: Sequence[str], convert: Callable[[Any], Any], tree: Any) -> Any:
    if not path:
        return convert(tree)
    return {**tree, path[0]: _convert_at(path[1:], convert, tree[path[0]])} if path[0] in tree else tree


def _convert_copies(convert: Callable[[Any], Any], params: Any, tree: Any) -> Any:
    """`tree` with `convert` applied to every part that is built like `params`: momenta, averages."""
    structure = jax.tree.structure(params)

    def is_copy(part: Any) -> bool:
        return bool(jax.tree.structure(part) == structure)  # type: ignore[operator]

    return jax.tree.map(lambda part: convert(part) if is_copy(part) else part, tree, is_leaf=is_copy)


def commutes(optimizer: optax.GradientTransformation, shapes: Any, layouts: Layouts) -> bool:
    """Whether `optimizer` does the same to parameters of these `shapes` in the documented tree and in `layouts`.

    One that works entry by entry does; one that treats arrays by their names, ranks or norms does not. Some steps are
    tried, without a gradient, where weight decay alone shows, and with one that is larger from array to array.
    """
    places = [path[1:] for path in layouts if path[0] == "params"]
    rng = np.random.default_rng(0)

    def random(path: Any, leaf: Any) -> np.ndarray:
        inside = any(tuple(key.key for key in path[: len(place)]) == place for place in places)
        return rng.normal(size=leaf.shape if inside else (1,) * len(leaf.shape)).astype(leaf.dtype)

    def moved(params: Any, gradients: Any) -> Any:
        def step(_: Any, carry: Any) -> Any:
            total, state = carry
            updates, state = optimizer.update(gradients, state, params)
            return jax.tree.map(jnp.add, total, updates), state

        start = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
        return jax.lax.fori_loop(0, _PROBED_STEPS, step, start)

    params = jax.tree_util.tree_map_with_path(random, shapes)
    leaves, structure = jax.tree.flatten(params)
    convert = partial(_convert_heads, layouts, "params")
    try:
        with jax.numpy_dtype_promotion("standard"), jax.transfer_guard("allow"):  # nothing here is the training's
            for scale in (0.0, 10.0):
                gradients = jax.tree.unflatten(structure, [leaf * scale * (i + 1) for i, leaf in enumerate(leaves)])
                total, state = jax.jit(moved)(params, gradients)
                expected = convert(total), _convert_copies(convert, params, state)
                found = jax.jit(moved)(convert(params), convert(gradients))
                same = jax.tree.map(partial(np.allclose, rtol=1e-3, atol=1e-30), found, expected)
                if not all(jax.tree.leaves(same)):
                    return False
    except (ValueError, TypeError, KeyError, AttributeError):  # an optimiser for this tree of parameters alone
        return False
    return True
